"""The backends whose backward pass autograd records: the definition, and the folded form over any attention.

The folded form runs over torch's attention (where ``sdpa.py`` does not serve), FlashAttention and FlexAttention. Those
for GPUs were not run on one yet: here the contract is checked as far as a CPU goes; ``pytest -m gpu`` does the rest.
Of each backend ``run_*`` takes a checked call, and ``*_limit`` says in a few words why it could not, or None.

Shapes: B samples, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.folded import Attend, folded_coefficients, infused_attention_folded
from mitrain_kernels.infused_attention.gate import GateSums, prefix_sums, shield, without_hidden, without_missing
from mitrain_kernels.infused_attention.reference import Call, infused_attention_reference

Result = tuple[Tensor, GateSums | None]


def each_sequence(run: Callable[[Call], Result], call: Call) -> Result:
    return torch.cat([run(one)[0] for one in call.sequences()], dim=2), None


def recorded(call: Call, form: Callable[..., Tensor], **more: Any) -> Tensor:
    """The output of a form that autograd records; what padding hides is kept from it, and from its gradients."""
    seen = {name: without_hidden(getattr(call, name), call.key_padding) for name in ("q", "k", "v")}
    return shield(form(**{**vars(call), **seen}, **more), call.key_padding)


def new_sums(call: Call) -> GateSums | None:
    """The gate's sums for the tokens that ``state_in`` does not know, where they are asked for."""
    if not call.return_state:
        return None
    (v, valid), (v_add,) = call.new_values, without_missing(call.present, call.v_add)
    return prefix_sums(v, v_add, valid, call.state_in)


def reference_limit(call: Call) -> str | None:
    return None if call.state_in is None else "the definition reads all values and takes no state"


def run_reference(call: Call) -> Result:
    if call.cu_seqlens is not None:
        return each_sequence(run_reference, call)
    return recorded(call, infused_attention_reference), new_sums(call)


def run_folded(call: Call) -> Result:
    """Over torch's own attention."""
    return recorded(call, infused_attention_folded), new_sums(call)


def folded_limit(call: Call) -> str | None:
    """Why the folded form over an attention that others wrote cannot serve."""
    if call.state_in is not None or call.return_state:
        return "it keeps no state for decoding"
    if call.gate == "token" and call.cu_seqlens is not None:
        return "the gate 'token' does not fold, and packed sequences would have to be taken apart"
    return bent_k_add(call)


def bent_k_add(call: Call) -> str | None:
    alive = call.k_add is not None and call.gate != "token" and call.softcap is not None
    return "k_add is alive under a softcap" if alive else None


def run_around(call: Call, attend: Attend) -> Result:
    """The folded form; packed sequences are attended to in one go, and the coefficients are each sequence's own."""
    if call.cu_seqlens is None:
        return recorded(call, infused_attention_folded, attend=attend), None
    rows: list[tuple[Tensor, ...]] = []
    for one in call.sequences():
        found, _ = folded_coefficients(one.v, **one.maps, present=one.present, gate=call.gate, base=one.base, eps=call.eps)
        rows.append(tuple(x.expand(-1, -1, one.v.shape[2], -1) for x in found))
    alpha, gamma, delta = (torch.cat(x, dim=2) for x in zip(*rows, strict=True))
    return torch.addcmul(delta, attend(call.q * alpha, call.k, call.v), gamma), None


def flash_limit(call: Call) -> str | None:
    if call.q.device.type != "cuda":
        return f"tensors are on {call.q.device}, not on a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'mitrain[gpu]')"
    if call.q.dtype not in (torch.float16, torch.bfloat16) or call.q.shape[-1] > 256:
        return f"FlashAttention takes float16 or bfloat16 and heads up to 256 wide, not {call.q.dtype}"
    if call.key_padding is not None and call.window is not None:
        return "FlashAttention counts a window over the tokens that are left without padding"
    return folded_limit(call)


def run_flash(call: Call) -> Result:
    """FlashAttention; the output of a padding query is 0."""
    if call.cu_seqlens is not None:
        return run_around(call, packed_flash(call))
    return run_around(call, plain_flash(call) if call.key_padding is None else unpadded_flash(call))


def flash_options(call: Call) -> dict[str, Any]:
    reach = -1 if call.window is None else call.window - 1
    window = (reach, 0 if call.causal else reach)
    return {
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size": (-1, -1) if call.window is None else window,
        "softcap": call.softcap or 0.0,
    }


def plain_flash(call: Call) -> Attend:
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


def unpadded_flash(call: Call) -> Attend:
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


def packed_flash(call: Call) -> Attend:
    bounds = call.cu_seqlens.int()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return varlen_flash(call, q, k, v, bounds, bounds).transpose(0, 1)[None]

    return attend


def flex_limit(call: Call) -> str | None:
    if call.q.device.type == "cpu" and call.trains:
        return "FlexAttention has no backward pass on a CPU"
    return folded_limit(call)


def run_flex(call: Call) -> Result:
    return run_around(call, flex_attend(call))


@cache
def flex_function(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def flex_attend(call: Call) -> Attend:
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
