"""``infused_attention``: checks its arguments, chooses a backend, says why once, and is one operator of torch each way.

torch.compile, export and autograd see one operator forward and one backward, whose work is done by ``forward`` and
``backward`` of ``sdpa.py`` or ``triton_launch.py``. An absent optional output is an empty tensor.
"""

import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mitrain_kernels.infused_attention import sdpa
from mitrain_kernels.infused_attention.backends import (
    Result,
    bent_k_add,
    each_sequence,
    flash_limit,
    flex_limit,
    reference_limit,
    run_flash,
    run_flex,
    run_folded,
    run_reference,
)
from mitrain_kernels.infused_attention.folded import keep_dead
from mitrain_kernels.infused_attention.gate import GateSums, full_precision
from mitrain_kernels.infused_attention.reference import Call, check

log = logging.getLogger(__name__)
LONG = 4096
"""Keys from which FlashAttention, where it is installed, is preferred to the fused kernel."""
WIDEST = 256
"""Head width of the Triton kernels; half of it in float32 and under the gate 'token'."""
TRITON = importlib.util.find_spec("triton") is not None
"""Whether it is installed; it is imported at the first launch."""


def infused_attention(*tensors: Tensor, backend: str = "auto", **options: Any) -> Tensor | tuple[Tensor, GateSums]:
    """Attention of text queries over keys and values infused by M modalities; the definition is the reference's.

    Args:
        tensors, options: the fields of ``Call`` (``reference.py``), by position or name.
        backend: 'reference' | 'sdpa' | 'flash' | 'flex' | 'triton' | 'auto'.

    Returns:
        (B, H, Tq, d) in q's type; with return_state also the sums. A query that sees no key gives 0.

    What is hidden counts as 0 in every backend, in the output and in the gradients, whatever it holds: the maps of a
    missing modality (and its logit, where all samples lack it), and NaN or infinity in keys, values, queries and
    upstream gradients of tokens that key_padding hides. Only a hidden query's own row may then be anything.

    Gradients come in their inputs' types. Under v_add = 0 or values of 0 the gate's cosine rises by up to 1/eps, so that
    true gradients of v_add and v can exceed 65,504, float16's highest number: they arrive there as infinity.

    Five calls lead from here to a kernel: ``run_operator``, ``Recorded.forward`` (only where autograd records),
    ``compute``, the backend's ``gates_of`` or ``forward``, the kernel.

    Raises:
        ValueError: arguments that do not fit together, or a backend that cannot do what is asked, in one line.
        RuntimeError: a second derivative (except by backend='reference').

    Source: MiT, arXiv 2403.05060, Eq. 1-5; the folding is proved at ``infused_attention_folded``.
    """
    call = autocast(Call(*tensors, **options))
    check(call)
    output, state = BACKENDS[choose(call, backend)].run(call)
    output = keep_dead(output, call.k_add) if call.k_add_is_dead else output
    return (output, state) if call.return_state else output


OWN = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation=str)
infused_attention.__signature__ = inspect.Signature([*inspect.signature(Call).parameters.values(), OWN])


def autocast(call: Call) -> Call:
    """q, k, v as autocast hands them to torch's own attention; the gate's arithmetic stays in float32."""
    kind = call.q.device.type
    if not torch.is_autocast_enabled(kind):
        return call
    dtype, low = torch.get_autocast_dtype(kind), (torch.float32, torch.float16, torch.bfloat16)
    q, k, v = (x.to(dtype) if x.dtype in low else x for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


def choose(call: Call, backend: str) -> str:
    """The backend's name; ValueError where the one asked for cannot do it."""
    if backend == "auto":
        name, reason = automatic(call)
        if not torch.compiler.is_compiling():
            say_once(name, reason)
        return name
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].limit(call)
    if reason:
        raise ValueError(f"backend {backend!r} cannot do this: {reason}; use backend='auto'")
    return backend


def automatic(call: Call) -> tuple[str, str]:
    """The fastest backend expected for a call, and why. What is expected of GPUs was not measured on one yet."""
    if call.q.device.type != "cuda":
        return "sdpa", f"torch's own attention is the fastest on {call.q.device.type}"
    keys = call.k.shape[2]
    if keys >= LONG and call.q.shape[2] > 1 and call.key_padding is None and flash_limit(call) is None:
        return "flash", f"{keys} keys without padding: FlashAttention gains more than the fused scaling saves"
    reason = triton_limit(call)
    if reason is None:
        return "triton", "a GPU: the infusion is fused into the attention kernel"
    return "sdpa", f"torch's own attention, as the Triton kernel cannot do this: {reason}"


@cache
def say_once(name: str, reason: str) -> None:
    log.info("infused_attention runs on %s: %s", name, reason)


def triton_limit(call: Call) -> str | None:
    q = call.q
    if not TRITON:
        return "triton is not installed"
    if q.device.type != "cuda" and not implementation("triton").INTERPRETED:
        return f"tensors are on {q.device}, not on a GPU"
    if q.dtype == torch.float64:
        return "it does not compute in float64"
    if not call.scale > 0:
        return f"scale is {call.scale}, and its softmax takes the highest score before it scales"
    widest = WIDEST if call.gate != "token" and q.dtype != torch.float32 else WIDEST // 2
    if q.shape[-1] > widest:
        return f"heads are {q.shape[-1]} wide, more than {widest} (of {q.dtype}, gate {call.gate!r})"
    return bent_k_add(call)


def implementation(backend: str) -> ModuleType:
    """The module that does an operator's work: ``prepared``, ``gates_of`` and ``forward``, or ``backward``.

    Triton's is imported when it is needed.
    """
    if backend == "sdpa":
        return sdpa
    from mitrain_kernels.infused_attention import triton_launch

    return triton_launch


def has_own_backward(call: Call) -> bool:
    """Whether the backward pass written for CPUs can serve; if not, autograd records the folded form."""
    on_cpu = call.q.device.type == "cpu"
    return on_cpu and call.gate != "token" and call.softcap is None and call.q.shape[0] * call.q.shape[2] > 0


def run_operator(backend: str, call: Call) -> Result:
    """By one operator each way: 'sdpa' or 'triton'."""
    if backend == "sdpa" and call.cu_seqlens is not None:
        return each_sequence(partial(run_operator, backend), call)
    if backend == "sdpa" and not has_own_backward(call):
        return run_folded(call)
    operator = forward_op if torch.compiler.is_compiling() else Recorded.apply if call.trains else compute
    output, *_, dot, square, count = operator(*pack(call, backend), backend, call.trains)
    return output, GateSums(dot, square, count) if call.return_state else None


class Backend(NamedTuple):
    """``run`` takes a checked call; ``limit`` says in a few words why it cannot, or None."""

    run: Callable[[Call], Result]
    limit: Callable[[Call], str | None]


BACKENDS = {
    "reference": Backend(run_reference, reference_limit),
    "sdpa": Backend(partial(run_operator, "sdpa"), lambda call: None),
    "flash": Backend(run_flash, flash_limit),
    "flex": Backend(run_flex, flex_limit),
    "triton": Backend(partial(run_operator, "triton"), triton_limit),
}


# The operator

TENSORS = [(x.name, x.type is not Tensor) for x in fields(Call) if x.type in (Tensor, Tensor | None)]
"""Of ``Call``, in its order: name, and whether it may be None. Then base (where it differs), and state_in's three."""
INPUTS = 8  # those that have a gradient: q … k_add (where it is alive)
SAVED = len(TENSORS) + 4
SCHEMA = ", ".join(f"Tensor{'?' * absent} {name}" for name, absent in TENSORS)
SCHEMA += ", Tensor? base, Tensor? dot, Tensor? square, Tensor? count, str gate, float[] numbers, str backend, bool trains"
NAME = "mitrain_kernels::infused_attention"


def pack(call: Call, backend: str) -> tuple[Any, ...]:
    """A call as the operators take it: tensors, gate and numbers."""
    unused = {"k_add": call.k_add_is_dead, "mask": backend == "triton"}
    tensors = [None if unused.get(name) else getattr(call, name) for name, _ in TENSORS]
    base, value = (call.base, 1.0) if isinstance(call.base, Tensor) else (None, call.base)
    numbers = (value, call.causal, call.window or 0, call.softcap or 0, call.scale, call.eps)
    return *tensors, base, *(call.state_in or (None, None, None)), call.gate, [float(x) for x in numbers]


def unpack(*packed: Any) -> Call:
    *tensors, base, dot, square, count, gate, (value, causal, window, softcap, scale, eps) = packed
    named = {name: x for (name, _), x in zip(TENSORS, tensors, strict=True)}
    return Call(
        **named, gate=gate, base=value if base is None else base, causal=bool(causal), window=int(window) or None,
        softcap=softcap or None, scale=scale, state_in=None if dot is None else GateSums(dot, square, count), eps=eps,
    )  # fmt: skip


def compute(*inputs: Any) -> tuple[Tensor, ...]:
    """The output; plain attention's output and log-sum-exp; the gate's cosine and root; its sums for the new tokens."""
    *packed, backend, trains = inputs
    with full_precision(packed[0]):
        module = implementation(backend)
        call = module.prepared(unpack(*packed))
        return module.forward(call, module.gates_of(call), trains)


forward_op = torch.library.custom_op(NAME, compute, mutates_args=(), schema=f"({SCHEMA}) -> ({', '.join(['Tensor'] * 8)})")


@forward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    *packed, backend, trains = inputs
    call = unpack(*packed)
    q, (B, H, Tq, d), (_, G, Tk, _), M = call.q, call.q.shape, call.k.shape, len(call.head_logit)
    exact = torch.promote_types(q.dtype, torch.float32)
    tokens = {"sequence": 1, "prefix": Tk if call.state_in is None else Tq, "token": Tk}.get(call.gate)
    batch = call.v_mul.shape[1] if call.gate == "sequence" else B
    gates = (M, batch, H, Tq if call.gate == "prefix" else tokens)
    sums = [gates, gates, (M, batch, H, tokens), (batch, G, tokens), (batch, tokens)]
    sums = [(0,)] * 5 if tokens is None else sums
    if backend == "triton":
        output, logsumexp = q.new_empty(B, Tq, H, d).transpose(1, 2), q.new_empty(B, H, Tq, dtype=exact)
    else:
        output, logsumexp = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=exact)
    kept = [torch.empty_like(output), logsumexp] if trains else [q.new_empty(0), q.new_empty(0, dtype=exact)]
    return output, *kept, *(q.new_empty(s, dtype=exact) for s in sums)


def compute_gradients(
    upstream: Tensor, tensors: list[Tensor | None], kept: list[Tensor], gate: str, numbers: list[float], backend: str,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of the first ``INPUTS`` tensors, in their types; an empty tensor for one that is not needed.

    kept: of the forward pass's outputs all but the first and the gate's sum ``dot``.
    """
    attended, logsumexp, *kept = kept
    with full_precision(upstream):
        call = unpack(*tensors, gate, numbers)
        found = implementation(backend).backward(upstream, call, attended, logsumexp, kept, needs)
    found = [*found[:3], *(g if g is None else g.contiguous() for g in found[3:])]
    found = [g if g is None else g.to(x.dtype) for g, x in zip(found, tensors[:INPUTS], strict=True)]
    return [g if n else upstream.new_empty(0) for g, n in zip(found, needs, strict=True)]


backward_op = torch.library.custom_op(NAME + "_backward", compute_gradients, mutates_args=())


@backward_op.register_fake
def _(upstream, tensors, kept, gate, numbers, backend, needs) -> list[Tensor]:
    found = [x if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:INPUTS]]
    if backend == "triton":
        first = [torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in tensors[:3]]
        found[:3] = (x.transpose(1, 2) for x in first)
    return [g if n else upstream.new_empty(0) for g, n in zip(found, needs, strict=True)]


def remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    *kept, _, square, count = output[1:]
    ctx.save_for_backward(*inputs[:SAVED], *kept, square, count)
    ctx.how = inputs[SAVED:-1]
    ctx.nothing = [None] * (len(inputs) - INPUTS)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def differentiate(ctx: Any, upstream: Tensor | None, *_: Any, backward: Callable = backward_op) -> tuple:
    if upstream is None:
        return *[None] * INPUTS, *ctx.nothing
    saved, needs = list(ctx.saved_tensors), list(ctx.needs_input_grad[:INPUTS])
    found = backward(upstream, saved[:SAVED], saved[SAVED:], *ctx.how, needs)
    if torch.is_grad_enabled():
        found = Final.apply(upstream.new_empty(0).requires_grad_(), *found)
    return *(g if n else None for g, n in zip(found, needs, strict=True)), *ctx.nothing


def refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the gradient of infused_attention's gradient is not implemented: use backend='reference' for second derivatives"
    )


class Final(torch.autograd.Function):
    """Gradients that cannot be differentiated again. Without it a second derivative would be missing in silence."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    backward = staticmethod(refuse)


class Recorded(torch.autograd.Function):
    """The operator without torch's library around it, whose Python costs half a millisecond a step."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = compute(*inputs)
        remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
        return differentiate(ctx, upstream, backward=backward_op if torch.is_grad_enabled() else compute_gradients)


forward_op.register_autograd(differentiate, setup_context=remember)
backward_op.register_autograd(refuse)
