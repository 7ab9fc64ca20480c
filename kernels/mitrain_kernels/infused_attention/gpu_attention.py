"""The folded form over attention that others wrote for GPUs: FlashAttention and FlexAttention.

Not run on a GPU yet: here the contract is checked as far as a CPU goes; ``pytest -m gpu`` does the rest.
Shapes: B samples, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.backends import Result, recorded
from mitrain_kernels.infused_attention.call import Call
from mitrain_kernels.infused_attention.folded import folded_coefficients, infused_attention_folded, keep_dead

HALVES = (torch.float16, torch.bfloat16)


def stateful(call: Call) -> str | None:
    return "it keeps no state for decoding" if call.state_in is not None or call.return_state else None


def bent_k_add(call: Call) -> str | None:
    alive = call.k_add is not None and call.gate != "token" and call.softcap is not None
    return "k_add is alive under a softcap" if alive else None


def packed_token(call: Call) -> str | None:
    packed = call.cu_seqlens is not None and call.gate == "token"
    return "the gate 'token' does not fold, and packed sequences would have to be taken apart" if packed else None


def flash_limit(call: Call) -> str | None:
    if call.q.device.type != "cuda":
        return f"tensors are on {call.q.device}, not on a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'mitrain[gpu]')"
    if call.q.dtype not in HALVES or call.q.shape[-1] > 256:
        return f"FlashAttention takes float16 or bfloat16 and heads up to 256 wide, not {call.q.dtype}"
    if call.key_padding is not None and call.window is not None:
        return "FlashAttention counts a window over the tokens that are left without padding"
    return stateful(call) or bent_k_add(call) or packed_token(call)


def run_flash(call: Call) -> Result:
    """FlashAttention; the output of a padding query is 0."""
    if call.cu_seqlens is not None:
        return run_packed(call, packed_flash(call)), None
    attend = unpadded_flash(call) if call.key_padding is not None else plain_flash(call)
    return recorded(call, infused_attention_folded, attend=attend), None


def flash_options(call: Call) -> dict[str, Any]:
    reach = -1 if call.window is None else call.window - 1
    window = (reach, 0 if call.causal else reach)
    return {
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size": (-1, -1) if call.window is None else window,
        "softcap": call.softcap or 0.0,
    }


def plain_flash(call: Call) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, **flash_options(call)).transpose(1, 2)

    return attend


def varlen_flash(call: Call, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor) -> Tensor:
    """q (R, H, d), k and v (R', G, d), bounds of the sequences in each."""
    from flash_attn import flash_attn_varlen_func

    longest = [int((x[1:] - x[:-1]).max()) for x in (of_q, of_k)]
    return flash_attn_varlen_func(q, k, v, of_q, of_k, *longest, **flash_options(call))


def unpadded_flash(call: Call) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The valid queries are the last of the valid keys, so that bottom-right causal masks stay right."""
    of_keys = call.key_padding
    of_queries = of_keys[:, -call.q.shape[2] :]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = [torch.nn.functional.pad(x.sum(1).cumsum(0), (1, 0)).int() for x in (of_queries, of_keys)]
        rows = q.transpose(1, 2)[of_queries], k.transpose(1, 2)[of_keys], v.transpose(1, 2)[of_keys]
        found = varlen_flash(call, *rows, *bounds)
        whole = found.new_zeros(q.shape[0], q.shape[2], *found.shape[1:])
        return whole.masked_scatter(of_queries[..., None, None], found).transpose(1, 2)

    return attend


def packed_flash(call: Call) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    bounds = call.cu_seqlens.int()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return varlen_flash(call, q, k, v, bounds, bounds).transpose(0, 1)[None]

    return attend


def run_packed(call: Call, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The folded form of packed sequences, attended to in one go; the coefficients are each sequence's own."""
    rows: list[tuple[Tensor, ...]] = []
    for one in call.sequences():
        found, _ = folded_coefficients(
            one.v, **one.maps, present=one.present, gate=call.gate, base=one.base, eps=call.eps
        )
        rows.append(tuple(x.expand(-1, -1, one.v.shape[2], -1) for x in found))
    alpha, gamma, delta = (torch.cat(x, dim=2) for x in zip(*rows, strict=True))
    return keep_dead(torch.addcmul(delta, attend(call.q * alpha, call.k, call.v), gamma), call.k_add)


def flex_limit(call: Call) -> str | None:
    if call.q.device.type == "cpu" and call.trains:
        return "FlexAttention has no backward pass on a CPU"
    return stateful(call) or bent_k_add(call) or packed_token(call)


def run_flex(call: Call) -> Result:
    attend = flex_attend(call)
    if call.cu_seqlens is not None:
        return run_packed(call, attend), None
    return recorded(call, infused_attention_folded, attend=attend), None


@cache
def flex_function(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def flex_attend(call: Call) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    tq, tk, device = call.q.shape[2], call.k.shape[2], call.q.device
    mask = create_block_mask(flex_visibility(call), len(call.q), None, tq, tk, device=device)
    cap = call.softcap

    def bend(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # on a CPU it refuses tensors that require a gradient, even if none is recorded
            q, k, v = (x.detach() for x in (q, k, v))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
            grouped = q.shape[1] != k.shape[1]
            run = flex_function(device.type == "cuda")
            return run(q, k, v, score_mod=bend if cap else None, block_mask=mask, scale=call.scale, enable_gqa=grouped)

    return attend


def flex_visibility(call: Call) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's mask function: which key j query i of sample b sees."""
    past, window, valid = call.k.shape[2] - call.q.shape[2], call.window, call.key_padding
    document = None
    if call.cu_seqlens is not None:
        positions = torch.arange(call.q.shape[2], device=call.q.device)
        document = torch.searchsorted(call.cu_seqlens.long(), positions, right=True)

    def visible(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + past if call.causal else j >= 0
        if window is not None:
            seen = seen & (i + past - j < window) & (j - i - past < window)
        if valid is not None:
            seen = seen & valid[b, j]
        return seen if document is None else seen & (document[i] == document[j])

    return visible
