"""The backends that run anywhere: the definition, torch's attention, and the Triton kernels.

Of each, ``run_*`` takes a checked call, and ``*_limit`` says in a few words why it could not, or None.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mitrain_kernels.infused_attention import library
from mitrain_kernels.infused_attention.call import Call, Setting
from mitrain_kernels.infused_attention.folded import infused_attention_folded, rows_that_see, visible_keys
from mitrain_kernels.infused_attention.gate import GateSums, prefix_sums
from mitrain_kernels.infused_attention.hidden import shield, without_hidden, without_missing
from mitrain_kernels.infused_attention.reference import infused_attention_reference
from mitrain_kernels.infused_attention.triton_tiles import INTERPRETED

Result = tuple[Tensor, GateSums | None]
WIDEST = 256  # head width of the Triton kernels; half of it in float32 and under the gate 'token'


def options(call: Call) -> dict[str, Any]:
    """What the definition and the folded form take besides tensors."""
    names = ("k_add", "present", "gate", "base", "key_padding", "causal", "window", "softcap", "scale", "eps")
    return {name: getattr(call, name) for name in names}


def each_sequence(run: Callable[[Call], Result], call: Call) -> Result:
    return torch.cat([run(one)[0] for one in call.sequences()], dim=2), None


def recorded(call: Call, form: Callable[..., Tensor], **more: Any) -> Tensor:
    """The output of a form that autograd records; what padding hides is kept from it, and from its gradients."""
    q, k, v = (without_hidden(x, call.key_padding) for x in (call.q, call.k, call.v))
    return shield(form(q, k, v, **call.maps, **options(call), **more), call.key_padding)


def reference_limit(call: Call) -> str | None:
    return None if call.state_in is None else "the definition reads all values and takes no state"


def run_reference(call: Call) -> Result:
    if call.cu_seqlens is not None:
        return each_sequence(run_reference, call)
    output = recorded(call, infused_attention_reference)
    return output, new_sums(call) if call.return_state else None


def sdpa_limit(call: Call) -> str | None:
    return None


def has_own_backward(call: Call) -> bool:
    """Whether the backward pass written for CPUs can serve; if not, autograd records the folded form."""
    on_cpu = call.q.device.type == "cpu"
    return on_cpu and call.gate != "token" and call.softcap is None and call.q.shape[0] * call.q.shape[2] > 0


def run_sdpa(call: Call) -> Result:
    if call.cu_seqlens is not None:
        return each_sequence(run_sdpa, call)
    if not has_own_backward(call):
        output = recorded(call, infused_attention_folded, before=call.state_in)
        return output, new_sums(call) if call.return_state else None
    mask, (tq, tk) = call.mask, (call.q.shape[2], call.k.shape[2])
    if mask is None and (call.key_padding is not None or call.window is not None or (call.causal and 1 < tq < tk)):
        mask = visible_keys(call.q, call.k, call.key_padding, call.causal, call.window)
    sees = rows_that_see(tq, tk, call.key_padding, call.causal, call.window)
    if call.mask is not None and call.mask.is_floating_point() and sees is not None:
        # a row of one finite number, however low, is a row of equal scores
        mask = call.mask.masked_fill(~sees[..., None], float("-inf"))
    return run_operator(call, "sdpa", mask, call.causal, sees)


def new_sums(call: Call) -> GateSums:
    """The gate's sums for the tokens that ``state_in`` does not know."""
    new = slice(0 if call.state_in is None else -call.q.shape[2], None)
    valid = None if call.key_padding is None else call.key_padding[:, new]
    v_add, *_ = without_missing(call.present, call.v_add)
    return prefix_sums(call.v[:, :, new], v_add, valid, call.state_in)


def triton_limit(call: Call) -> str | None:
    q = call.q
    if q.device.type != "cuda" and not INTERPRETED:
        return f"tensors are on {q.device}, not on a GPU"
    if q.dtype == torch.float64:
        return "it does not compute in float64"
    widest = WIDEST if call.gate != "token" and q.dtype != torch.float32 else WIDEST // 2
    if q.shape[-1] > widest:
        return f"heads are {q.shape[-1]} wide, more than {widest} (of {q.dtype}, gate {call.gate!r})"
    if call.k_add is not None and call.gate != "token" and call.softcap is not None:
        return "k_add is alive under a softcap"
    return None


def run_triton(call: Call) -> Result:
    return run_operator(call, "triton", None, call.causal, None)


def run_operator(call: Call, backend: str, mask: Tensor | None, causal: bool, sees: Tensor | None) -> Result:
    base = call.base if isinstance(call.base, Tensor) else float(call.base)
    setting = Setting(
        call.gate, base, call.key_padding, mask, sees, call.present, call.cu_seqlens,
        causal, call.window, call.softcap, call.scale, call.eps,
    )  # fmt: skip
    extra, numbers = library.pack(setting)
    state = call.state_in or (None, None, None)
    k_add = None if call.k_add_is_dead else call.k_add
    tensors = (call.q, call.k, call.v, *call.maps.values(), k_add, *extra, *state)
    output, *_, dot, square, count = library.apply(
        *tensors, call.gate, numbers, backend, call.trains, trains=call.trains
    )
    return output, GateSums(dot, square, count) if call.return_state else None
