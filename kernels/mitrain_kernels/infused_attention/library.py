"""Infused attention as operators of torch's library: torch.compile, export and autograd see one operator each way.

The backend modules' ``forward`` and ``backward`` do the work. An absent optional output is an empty tensor. Shapes are
those of ``infused_attention``.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mitrain_kernels.infused_attention import sdpa, triton_launch
from mitrain_kernels.infused_attention.call import Setting
from mitrain_kernels.infused_attention.gate import GateSums, full_precision

BACKENDS: dict[str, ModuleType] = {"sdpa": sdpa, "triton": triton_launch}
INPUTS = 8  # q, k, v, k_mul, v_mul, v_add, head_logit, k_add (where it is alive)
EXTRA = slice(INPUTS, INPUTS + 6)  # base, valid, mask, sees, present, cu_seqlens; then dot, square, count
KIND = EXTRA.stop + 3  # kind, numbers, backend, trains
KEPT = (
    INPUTS + 6
)  # among what is saved: attended, logsumexp (triton), cosine, root, square, count; then the extra tensors
NAME = "mitrain_kernels::infused_attention"


def forward_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_mul: Tensor,
    v_mul: Tensor,
    v_add: Tensor,
    head_logit: Tensor,
    k_add: Tensor | None,
    base: Tensor | None,
    valid: Tensor | None,
    mask: Tensor | None,
    sees: Tensor | None,
    present: Tensor | None,
    cu_seqlens: Tensor | None,
    dot: Tensor | None,
    square: Tensor | None,
    count: Tensor | None,
    kind: str,
    numbers: list[float],
    backend: str,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output; plain attention's output and log-sum-exp; the gate's cosine and root; its sums for the new tokens.

    base to cu_seqlens and numbers: as ``pack`` makes them of a setting. dot, square, count: the sums so far, or None.
    """
    setting = unpack(kind, (base, valid, mask, sees, present, cu_seqlens), numbers)
    before = None if dot is None else GateSums(dot, square, count)
    with full_precision(q):
        inputs = (q, k, v, k_mul, v_mul, v_add, head_logit, k_add)
        return BACKENDS[backend].forward(inputs, setting, before, trains)


forward_op = torch.library.custom_op(NAME, forward_now, mutates_args=())


@forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    q, k, v_mul, head_logit = (arguments[i] for i in (0, 1, 4, 6))
    continued, (kind, _, backend, trains) = arguments[EXTRA.stop] is not None, arguments[KIND:]
    (B, H, Tq, d), (_, G, Tk, _), M = q.shape, k.shape, len(head_logit)
    exact = torch.promote_types(q.dtype, torch.float32)
    tokens = {"sequence": 1, "prefix": Tq if continued else Tk, "token": Tk}.get(kind)
    batch = v_mul.shape[1] if kind == "sequence" else B
    gates = (M, batch, H, Tq if kind == "prefix" else tokens)
    sums = [gates, gates, (M, batch, H, tokens), (batch, G, tokens), (batch, tokens)]
    sums = [(0,)] * 5 if tokens is None else sums
    if backend == "triton":
        output, logsumexp = q.new_empty(B, Tq, H, d).transpose(1, 2), q.new_empty(B, H, Tq, dtype=exact)
    else:
        output, logsumexp = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=exact)
    kept = [torch.empty_like(output), logsumexp] if trains else [q.new_empty(0), q.new_empty(0, dtype=exact)]
    return output, *kept, *(q.new_empty(s, dtype=exact) for s in sums)


def backward_now(
    upstream: Tensor,
    inputs: list[Tensor | None],
    attended: Tensor,
    logsumexp: Tensor,
    kept: list[Tensor],
    extra: list[Tensor | None],
    kind: str,
    numbers: list[float],
    backend: str,
    continued: bool,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of the inputs, in their types; an empty tensor for one that is not needed."""
    setting = unpack(kind, extra, numbers)
    with full_precision(upstream):
        found = BACKENDS[backend].backward(upstream, inputs, setting, attended, logsumexp, kept, continued, needs)
    found = [*found[:3], *(g if g is None else g.contiguous() for g in found[3:])]
    found = [g if g is None or g.dtype == x.dtype else g.to(x.dtype) for g, x in zip(found, inputs, strict=True)]
    return [g if n else upstream.new_empty(0) for g, n in zip(found, needs, strict=True)]


backward_op = torch.library.custom_op(NAME + "_backward", backward_now, mutates_args=())


@backward_op.register_fake
def _(upstream, inputs, attended, logsumexp, kept, extra, kind, numbers, backend, continued, needs) -> list[Tensor]:
    plain = [x if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    if backend == "triton":
        first = [torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in inputs[:3]]
        found = [*(x.transpose(1, 2) for x in first), *plain[3:]]
    else:
        found = plain
    return [g if n else upstream.new_empty(0) for g, n in zip(found, needs, strict=True)]


def pack(setting: Setting) -> tuple[list[Tensor | None], list[float]]:
    """A setting as the operators take it: the optional tensors, and the numbers."""
    base = setting.base if isinstance(setting.base, Tensor) else None
    tensors = [base, setting.valid, setting.mask, setting.sees, setting.present, setting.cu_seqlens]
    value = 1.0 if base is not None else float(setting.base)
    numbers = [value, setting.causal, setting.window or 0, setting.softcap or 0, setting.scale, setting.eps]
    return tensors, [float(x) for x in numbers]


def unpack(kind: str, extra: Sequence[Tensor | None], numbers: list[float]) -> Setting:
    base, *tensors = extra
    value, causal, window, softcap, scale, eps = numbers
    base = value if base is None else base
    return Setting(kind, base, *tensors, bool(causal), int(window) or None, softcap or None, scale, eps)


def remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, attended, logsumexp, cosine, root, _, square, count = output
    ctx.save_for_backward(*inputs[:INPUTS], attended, logsumexp, cosine, root, square, count, *inputs[EXTRA])
    ctx.continued = inputs[EXTRA.stop] is not None
    ctx.kind, ctx.numbers, ctx.backend, _ = inputs[KIND:]
    ctx.nothing = [None] * (len(inputs) - INPUTS)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def differentiate(ctx: Any, upstream: Tensor | None, *_: Any, backward: Callable = backward_op) -> tuple:
    if upstream is None:
        return *[None] * INPUTS, *ctx.nothing
    saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:INPUTS])
    inputs, (attended, logsumexp, *kept) = list(saved[:INPUTS]), saved[INPUTS:KEPT]
    rest = (list(saved[KEPT:]), ctx.kind, ctx.numbers, ctx.backend, ctx.continued, needs)
    found = backward(upstream, inputs, attended, logsumexp, kept, *rest)
    if torch.is_grad_enabled():
        found = Final.apply(upstream.new_empty(0).requires_grad_(), *found)
    return *(g if n else None for g, n in zip(found, needs, strict=True)), *ctx.nothing


class Final(torch.autograd.Function):
    """Gradients that cannot be differentiated again. Without it a second derivative would be missing in silence."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        refuse(ctx)


class Recorded(torch.autograd.Function):
    """The operator without torch's library around it, whose Python costs half a millisecond a step."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = forward_now(*inputs)
        remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple:
        return differentiate(ctx, upstream, backward=backward_op if torch.is_grad_enabled() else backward_now)


def apply(*inputs: Any, trains: bool) -> tuple[Tensor, ...]:
    """The operator's outputs, the shortest way."""
    if torch.compiler.is_compiling():
        return forward_op(*inputs)
    return Recorded.apply(*inputs) if trains else forward_now(*inputs)


def refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the gradient of infused_attention's gradient is not implemented: use backend='reference' for second derivatives"
    )


forward_op.register_autograd(differentiate, setup_context=remember)
backward_op.register_autograd(refuse)
