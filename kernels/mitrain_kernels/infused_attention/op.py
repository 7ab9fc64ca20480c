"""``infused_attention``: checks its arguments, chooses a backend, and says why once."""

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mitrain_kernels.infused_attention import library, sdpa
from mitrain_kernels.infused_attention.call import Call, Setting, check
from mitrain_kernels.infused_attention.folded import infused_attention_folded, keep_dead, visible_keys
from mitrain_kernels.infused_attention.gate import GateSums, prefix_sums
from mitrain_kernels.infused_attention.reference import EPSILON, infused_attention_reference

log = logging.getLogger(__name__)
Result = tuple[Tensor, GateSums | None]


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
        mask (B or 1, 1, Tq, Tk): the visibility that causal, window and key_padding say, ready-made (bool or additive),
            for backends that need one; it saves making it in every layer.
        state_in: the gate's sums before the queries (gate 'prefix'), so that only the queries' values are summed;
            return_state: also return the sums of the new tokens, of which ``.last()`` goes into the next call.
        backend: 'reference' | 'sdpa' | 'flash' | 'flex' | 'triton' | 'auto'.

    Returns:
        (B, H, Tq, d) in q's type; with return_state also the sums. A query that sees no key gives 0.

    Raises:
        ValueError: arguments that do not fit together, or a backend that cannot do what is asked, in one line.
        RuntimeError: a second derivative (except by backend='reference').

    Source: MiT, arXiv 2403.05060, Eq. 1-5; the folding is proved at ``infused_attention_folded``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    maps = (k_mul, v_mul, v_add, head_logit)
    call = Call(
        q, k, v, *maps, k_add, present, gate, base, key_padding, mask, cu_seqlens, causal, window, softcap, scale,
        state_in, return_state, eps,
    )  # fmt: skip
    check(call)
    output, state = BACKENDS[choose(call, backend)](call)
    output = keep_dead(output, k_add) if call.k_add_is_dead else output
    return (output, state) if return_state else output


def choose(call: Call, backend: str) -> str:
    """The backend's name; ValueError where the one asked for cannot do it."""
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is unknown: choose one of auto, {', '.join(BACKENDS)}")
        reason = LIMITS[backend](call)
        if reason:
            raise ValueError(f"backend {backend!r} cannot do this: {reason}; use backend='auto'")
        return backend
    name, reason = automatic(call)
    say_once(name, reason)
    return name


def automatic(call: Call) -> tuple[str, str]:
    return "sdpa", "torch's own attention"


@cache
def say_once(name: str, reason: str) -> None:
    log.info("infused_attention runs on %s: %s", name, reason)


def no_limit(call: Call) -> str | None:
    return None


def reference_limit(call: Call) -> str | None:
    return None if call.state_in is None else "the definition reads all values and takes no state"


def run_reference(call: Call) -> Result:
    if call.cu_seqlens is not None:
        return each_sequence(run_reference, call)
    options = common(call) | {"k_add": call.k_add, "scale": call.scale}
    output = infused_attention_reference(call.q, call.k, call.v, **call.maps, **options)
    return output, prefix_sums(call.v, call.v_add, call.key_padding) if call.return_state else None


def common(call: Call) -> dict:
    names = ("present", "gate", "base", "key_padding", "causal", "window", "softcap", "eps")
    return {name: getattr(call, name) for name in names}


def each_sequence(run: Callable[[Call], Result], call: Call) -> Result:
    return torch.cat([run(one)[0] for one in call.sequences()], dim=2), None


def run_sdpa(call: Call) -> Result:
    if call.cu_seqlens is not None:
        return each_sequence(run_sdpa, call)
    if call.q.device.type != "cpu" or call.gate == "token" or call.softcap is not None or not cpu_flash_fits(call):
        return run_folded(call, None)
    mask, causal, sees = call.mask, call.causal, rows_that_see(call)
    tq, tk = call.q.shape[2], call.k.shape[2]
    if mask is None and (call.key_padding is not None or call.window is not None or (causal and 1 < tq < tk)):
        mask = visible_keys(call.q, call.k, call.key_padding, causal, call.window)
    return run_operator(call, "sdpa", mask, causal and mask is None and tq > 1, sees)


def run_operator(call: Call, backend: str, mask: Tensor | None, causal: bool, sees: Tensor | None) -> Result:
    setting = Setting(
        call.gate, call.base if isinstance(call.base, Tensor) else float(call.base), call.key_padding, mask, sees,
        call.present, call.cu_seqlens, causal, call.window, call.softcap, call.scale, call.eps,
    )  # fmt: skip
    extra, numbers = library.pack(setting)
    state = call.state_in or (None, None, None)
    k_add = None if call.k_add_is_dead else call.k_add
    tensors = (call.q, call.k, call.v, *call.maps.values(), k_add, *extra, *state)
    output, *_, dot, square, count = library.apply(
        *tensors, call.gate, numbers, backend, call.trains, trains=call.trains
    )
    return output, GateSums(dot, square, count) if call.return_state else None


def cpu_flash_fits(call: Call) -> bool:
    """Whether torch's CPU flash operators take these tensors; if not, its public attention does."""
    return KNOWN and call.q.shape[2] > 0 and call.q.shape[0] > 0 and (call.mask is None or not call.mask.requires_grad)


KNOWN = sdpa.flash_is_known()


def rows_that_see(call: Call) -> Tensor | None:
    """(B, 1, Tq) bool: the queries that see any key; None when all do."""
    valid = call.key_padding
    if valid is None:
        return None
    tq, tk, window = call.q.shape[2], call.k.shape[2], call.window
    so_far = F.pad(valid.long().cumsum(-1), (1, 0))  # (B, Tk + 1): tokens before a position
    positions = torch.arange(tk - tq, tk, device=valid.device)
    end = (
        positions + 1
        if call.causal
        else (positions + window).clamp(max=tk)
        if window
        else torch.full_like(positions, tk)
    )
    start = (positions + 1 - window).clamp(min=0) if window else torch.zeros_like(positions)
    return (so_far[:, end] > so_far[:, start])[:, None]


def run_folded(call: Call, attend: Callable | None) -> Result:
    """Recorded by autograd, over any plain attention."""
    return infused_attention_folded(
        call.q, call.k, call.v, **call.maps, **common(call), k_add=call.k_add, scale=call.scale
    ), None


def run_triton(call: Call) -> Result:
    return run_operator(call, "triton", None, call.causal, None)


BACKENDS: dict[str, Callable[[Call], Result]] = {"reference": run_reference, "sdpa": run_sdpa, "triton": run_triton}
LIMITS: dict[str, Callable[[Call], str | None]] = {"reference": reference_limit, "sdpa": no_limit, "triton": no_limit}
