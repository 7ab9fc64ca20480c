"""``infused_attention``: checks its arguments, chooses a backend, and says why once."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.backends import (
    Result,
    reference_limit,
    run_reference,
    run_sdpa,
    run_triton,
    sdpa_limit,
    triton_limit,
)
from mitrain_kernels.infused_attention.call import Call, check
from mitrain_kernels.infused_attention.folded import keep_dead
from mitrain_kernels.infused_attention.gate import GateSums
from mitrain_kernels.infused_attention.gpu_attention import flash_limit, flex_limit, run_flash, run_flex
from mitrain_kernels.infused_attention.reference import EPSILON

log = logging.getLogger(__name__)


def infused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_mul: Tensor,
    v_mul: Tensor,
    v_add: Tensor,
    head_logit: Tensor,
    *,
    k_add: Tensor | None = None,
    present: Tensor | None = None,
    gate: str = "prefix",
    base: int | Tensor = 1,
    key_padding: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    state_in: GateSums | None = None,
    return_state: bool = False,
    eps: float = EPSILON,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, GateSums]:
    """Attention of text queries over keys and values infused by M modalities; the definition is the reference's.

    Args:
        q (B, H, Tq, d), k and v (B, G, Tk, d), after rotary embedding: queries are the last Tq of the Tk positions.
            Packed: (1, ·, all tokens, d) with ``cu_seqlens`` (S + 1,), the sequences' bounds; B is then S elsewhere.
        k_mul, v_mul, v_add, k_add: (M, B, H, d), M >= 0. head_logit (M, H). present (M, B) bool, False: missing.
        gate: 'prefix' | 'sequence' | 'token' | 'head' | 'none'. base: 1, 0 or (B,).
        key_padding (B, Tk) bool, True for a token. window: key j is visible to query i if i − j < window.
        mask (B or 1, 1, Tq, Tk): the visibility that causal, window and key_padding say, ready-made (bool or additive,
            -inf or the lowest finite number where hidden), for backends that need one; it saves making it in every layer.
        state_in: the gate's sums before the queries (gate 'prefix'), so that only the queries' values are summed;
            return_state: also return the sums of the new tokens, of which ``.last()`` goes into the next call.
        backend: 'reference' | 'sdpa' | 'flash' | 'flex' | 'triton' | 'auto'.

    Returns:
        (B, H, Tq, d) in q's type; with return_state also the sums. A query that sees no key gives 0.

    What is hidden counts as 0 in every backend, in the output and in the gradients, whatever it holds: the maps of a
    missing modality (and its logit, where all samples lack it), and NaN or infinity in keys, values, queries and
    upstream gradients of tokens that key_padding hides. Only a hidden query's own row may then be anything.

    Gradients come in their inputs' types. Under v_add = 0 or values of 0 the gate's cosine rises by up to 1/eps, so that
    true gradients of v_add and v can exceed 65,504, float16's highest number: they arrive there as infinity.

    Raises:
        ValueError: arguments that do not fit together, or a backend that cannot do what is asked, in one line.
        RuntimeError: a second derivative (except by backend='reference').

    Source: MiT, arXiv 2403.05060, Eq. 1-5; the folding is proved at ``infused_attention_folded``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = autocast(q, k, v)
    maps = (k_mul, v_mul, v_add, head_logit)
    call = Call(
        q, k, v, *maps, k_add, present, gate, base, key_padding, mask, cu_seqlens, causal, window, softcap, scale,
        state_in, return_state, eps,
    )  # fmt: skip
    check(call)
    output, state = BACKENDS[choose(call, backend)](call)
    output = keep_dead(output, k_add) if call.k_add_is_dead else output
    return (output, state) if return_state else output


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast hands them to torch's own attention; the gate's arithmetic stays in float32."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in tensors)


def choose(call: Call, backend: str) -> str:
    """The backend's name; ValueError where the one asked for cannot do it."""
    if backend == "auto":
        name, reason = automatic(call)
        if not torch.compiler.is_compiling():
            say_once(name, reason)
        return name
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of auto, {', '.join(BACKENDS)}")
    reason = LIMITS[backend](call)
    if reason:
        raise ValueError(f"backend {backend!r} cannot do this: {reason}; use backend='auto'")
    return backend


def automatic(call: Call) -> tuple[str, str]:
    """The fastest backend expected for a call, and why. What is expected of GPUs was not measured on one yet."""
    if call.q.device.type != "cuda":
        return "sdpa", f"torch's own attention is the fastest on {call.q.device.type}"
    long = call.k.shape[2] >= LONG and call.q.shape[2] > 1
    if long and call.key_padding is None and flash_limit(call) is None:
        return (
            "flash",
            f"{call.k.shape[2]} keys without padding: FlashAttention gains more than the fused scaling saves",
        )
    reason = triton_limit(call)
    if reason is None:
        return "triton", "a GPU: the infusion is fused into the attention kernel"
    return "sdpa", f"torch's own attention, as the Triton kernel cannot do this: {reason}"


@cache
def say_once(name: str, reason: str) -> None:
    log.info("infused_attention runs on %s: %s", name, reason)


BACKENDS: dict[str, Callable[[Call], Result]] = {
    "reference": run_reference,
    "sdpa": run_sdpa,
    "flash": run_flash,
    "flex": run_flex,
    "triton": run_triton,
}
LIMITS: dict[str, Callable[[Call], str | None]] = {
    "reference": reference_limit,
    "sdpa": sdpa_limit,
    "flash": flash_limit,
    "flex": flex_limit,
    "triton": triton_limit,
}
LONG = 4096
"""Keys from which FlashAttention, where it is installed, is preferred to the fused kernel."""
