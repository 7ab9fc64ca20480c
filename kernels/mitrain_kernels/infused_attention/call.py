"""One call of ``infused_attention``, checked: what every backend is handed.

Shapes: B batch (packed: S sequences), H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width,
M modalities.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.gate import GateSums
from mitrain_kernels.infused_attention.reference import GATES

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Setting(NamedTuple):
    """What an operator is told that is not differentiated.

    kind: the gate. base: a number or (B,). valid (B, Tk) bool, mask (B or 1, 1, Tq, Tk) bool or additive, sees
    (B, 1, Tq) bool: the queries that see a key; present (M, B) bool; each None where everything is there.
    """

    kind: str
    base: Tensor | float
    valid: Tensor | None
    mask: Tensor | None
    sees: Tensor | None
    present: Tensor | None
    cu_seqlens: Tensor | None
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    eps: float


@dataclass(frozen=True)
class Call:
    """The arguments of ``infused_attention`` after ``check``."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_mul: Tensor
    v_mul: Tensor
    v_add: Tensor
    head_logit: Tensor
    k_add: Tensor | None
    present: Tensor | None
    gate: str
    base: int | Tensor
    key_padding: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    state_in: GateSums | None
    return_state: bool
    eps: float

    @property
    def maps(self) -> dict[str, Tensor]:
        return {"k_mul": self.k_mul, "v_mul": self.v_mul, "v_add": self.v_add, "head_logit": self.head_logit}

    @property
    def k_add_is_dead(self) -> bool:
        """Whether softmax drops k_add: the gate does not depend on the key, and nothing bends the scores."""
        return self.gate != "token" and self.softcap is None

    @property
    def trains(self) -> bool:
        """Whether autograd records this call."""
        alive = [] if self.k_add is None or self.k_add_is_dead else [self.k_add]
        tensors = (self.q, self.k, self.v, *self.maps.values(), *alive)
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)

    def sequences(self) -> list["Call"]:
        """The packed sequences as calls of their own, one sample each."""
        bounds = self.cu_seqlens.tolist()
        return [self.sequence(i, slice(a, b)) for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]

    def sequence(self, index: int, tokens: slice) -> "Call":
        one = slice(index, index + 1)
        parts = {name: getattr(self, name)[:, :, tokens] for name in ("q", "k", "v")}
        parts |= {name: getattr(self, name)[:, one] for name in ("k_mul", "v_mul", "v_add")}
        parts["k_add"] = None if self.k_add is None else self.k_add[:, one]
        parts["present"] = None if self.present is None else self.present[:, one]
        parts["base"] = self.base[one] if isinstance(self.base, Tensor) else self.base
        return replace(self, **parts, cu_seqlens=None)


def check(call: Call) -> None:
    """ValueError, in one line, for arguments that do not fit together."""
    q, k, v = call.q, call.k, call.v
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be (B, H, Tq, d), (B, G, Tk, d), (B, G, Tk, d), but are {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads: give a multiple")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries are more than {k.shape[2]} keys: queries are the last of the keys")
    if call.gate not in GATES:
        raise ValueError(f"gate {call.gate!r} is unknown: choose one of {', '.join(GATES)}")
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v must share a floating type, but are {q.dtype}, {k.dtype}, {v.dtype}")
    if call.window is not None and call.window < 1:
        raise ValueError(f"window={call.window} shows no key: give at least 1, or None")
    check_packing(call)
    check_maps(call)
    check_masks(call)
    check_state(call)


def check_packing(call: Call) -> None:
    lengths = call.cu_seqlens
    if lengths is None:
        return
    if len(call.q) != 1 or call.q.shape[2] != call.k.shape[2]:
        raise ValueError("packed q, k, v must be (1, heads, all tokens, d), with as many queries as keys")
    if call.key_padding is not None or call.mask is not None or call.state_in is not None or call.return_state:
        raise ValueError("cu_seqlens excludes key_padding, mask and state: packed sequences have no padding")
    if lengths.ndim != 1 or len(lengths) < 2 or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be (sequences + 1,) integers, but is {tuple(lengths.shape)} {lengths.dtype}")
    if lengths.device.type == "cpu":
        bounds, tokens = lengths.tolist(), call.q.shape[2]
        if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, the number of tokens, but is {bounds}")


def check_maps(call: Call) -> None:
    batch = len(call.q) if call.cu_seqlens is None else len(call.cu_seqlens) - 1
    heads, width = call.q.shape[1], call.q.shape[3]
    shape = (len(call.head_logit), batch, heads, width)
    for name in ("k_mul", "v_mul", "v_add", "k_add"):
        x = getattr(call, name)
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must be (M, B, H, d) = {shape}, but is {tuple(x.shape)}")
    if tuple(call.head_logit.shape) != (shape[0], heads):
        raise ValueError(f"head_logit must be (M, H) = {(shape[0], heads)}, but is {tuple(call.head_logit.shape)}")
    if call.present is not None and (tuple(call.present.shape) != shape[:2] or call.present.dtype != torch.bool):
        raise ValueError(f"present must be (M, B) = {shape[:2]} bool, but is {tuple(call.present.shape)}")
    if isinstance(call.base, Tensor) and tuple(call.base.shape) != (batch,):
        raise ValueError(f"base must be 0, 1 or (B,) = {(batch,)}, but is {tuple(call.base.shape)}")


def check_masks(call: Call) -> None:
    keys = (len(call.k), call.k.shape[2])
    padding, mask = call.key_padding, call.mask
    if padding is not None and (tuple(padding.shape) != keys or padding.dtype != torch.bool):
        raise ValueError(f"key_padding must be (B, Tk) = {keys} bool, but is {tuple(padding.shape)} {padding.dtype}")
    if mask is not None and (mask.ndim != 4 or tuple(mask.shape[2:]) != (call.q.shape[2], keys[1])):
        raise ValueError(f"mask must be (B or 1, 1, Tq, Tk) bool or additive, but is {tuple(mask.shape)}")


def check_state(call: Call) -> None:
    if (call.state_in is not None or call.return_state) and call.gate != "prefix":
        raise ValueError(f"the gate {call.gate!r} has no state to decode with: use the gate 'prefix'")
    if call.state_in is not None and call.state_in.count.shape[-1] != 1:
        raise ValueError("state_in must be the sums of one token: give state.last()")
