"""The arguments of infused attention, and its definition in plain torch: slow, materialises everything, clean in float64.

Every other form is tested against the definition, output and gradients.

Shapes: B batch (packed: S sequences), H query heads, G key/value heads (query head h reads key/value head
h // (H / G)), T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.gate import EPSILON, GateSums, without_missing

GATES = ("sequence", "prefix", "token", "head", "none")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """The arguments of ``infused_attention``, which every form, backend and launch of it is handed.

    Args:
        q (B, H, Tq, d), k and v (B, G, Tk, d), after rotary embedding: queries are the last Tq of the Tk positions.
            Packed: (1, ·, all tokens, d) with ``cu_seqlens`` (S + 1,), the sequences' bounds; B is then S elsewhere.
        k_mul, v_mul, v_add, k_add: (M, B, H, d), M >= 0. head_logit (M, H). No k_add means 0.
        present (M, B) bool: False is a missing modality, whose gate is 0, whatever its maps hold.
        key_padding (B, Tk) bool, True for a token.
        mask (B or 1, 1, Tq, Tk): the visibility that causal, window and key_padding say, ready-made (bool or additive,
            -inf or the lowest finite number where hidden), for backends that need one; it saves making it in every layer.
        gate: 'prefix' | 'sequence' | 'token' | 'head' | 'none'. base: 1 keeps the frozen key and value (the authors'
            release), 0 drops them (the paper's equations); a (B,) tensor chooses per sample.
        window: key j is visible to query i if i − j < window. scale: d^(-1/2) unless given.
        state_in: the gate's sums before the queries (gate 'prefix'), so that only the queries' values are summed;
            return_state: also return the sums of the new tokens, of which ``.last()`` goes into the next call.
        eps: what keeps the cosine of a zero vector finite (``gate.py``).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_mul: Tensor
    v_mul: Tensor
    v_add: Tensor
    head_logit: Tensor
    _: KW_ONLY
    k_add: Tensor | None = None
    present: Tensor | None = None
    key_padding: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    gate: str = "prefix"
    base: int | float | Tensor = 1
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    state_in: GateSums | None = None
    return_state: bool = False
    eps: float = EPSILON

    def __post_init__(self) -> None:
        if self.scale is None:
            object.__setattr__(self, "scale", self.q.shape[-1] ** -0.5)

    @property
    def maps(self) -> dict[str, Tensor]:
        return {"k_mul": self.k_mul, "v_mul": self.v_mul, "v_add": self.v_add, "head_logit": self.head_logit}

    @property
    def k_add_is_dead(self) -> bool:
        """Whether softmax drops k_add: the gate does not depend on the key, and nothing bends the scores."""
        return self.gate != "token" and self.softcap is None

    @property
    def new_values(self) -> tuple[Tensor, Tensor | None]:
        """The values whose sums ``state_in`` does not know, and which of them are tokens."""
        first = 0 if self.state_in is None else -self.q.shape[2]
        return self.v[:, :, first:], None if self.key_padding is None else self.key_padding[:, first:]

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
        maps = {name: getattr(self, name) for name in ("k_mul", "v_mul", "v_add", "k_add", "present")}
        parts |= {name: None if x is None else x[:, one] for name, x in maps.items()}
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
    keys = (len(call.k), call.k.shape[2])
    padding, mask = call.key_padding, call.mask
    if padding is not None and (tuple(padding.shape) != keys or padding.dtype != torch.bool):
        raise ValueError(f"key_padding must be (B, Tk) = {keys} bool, but is {tuple(padding.shape)} {padding.dtype}")
    if mask is not None and (mask.ndim != 4 or tuple(mask.shape[2:]) != (call.q.shape[2], keys[1])):
        raise ValueError(f"mask must be (B or 1, 1, Tq, Tk) bool or additive, but is {tuple(mask.shape)}")
    if (call.state_in is not None or call.return_state) and call.gate != "prefix":
        raise ValueError(f"the gate {call.gate!r} has no state to decode with: use the gate 'prefix'")
    if call.state_in is not None and call.state_in.count.shape[-1] != 1:
        raise ValueError("state_in must be the sums of one token: give state.last()")


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


def infused_attention_reference(*tensors: Tensor, **options: object) -> Tensor:
    r"""Attention of text queries over keys and values infused by M modalities; takes the fields of ``Call``, not packed.

        K'_tj = base K_j + Σ_m g_mtj (K_j ⊙ k_mul_m + k_add_m)        softmax_j(scale q_t·K'_tj) over visible j
        V'_tj = base V_j + Σ_m g_mtj (V_j ⊙ v_mul_m + v_add_m)        o_t = Σ_j p_tj V'_tj

    where:
        gate g: σ(L + cos), L = head_logit, cos = Σ_j V_j·v_add / √(Σ_j ‖V_j‖² · n · ‖v_add‖² + eps²), the n sums over
            'sequence' all valid keys | 'prefix' the valid keys up to the query | 'token' the key j alone;
            'head' σ(L) without the cosine | 'none' 1.
        A query that sees no key returns 0. Returns (B, H, Tq, d).

    Source: MiT, arXiv 2403.05060, Eq. 1-5 (k_mul = I_d^k, k_add = I_a^k, v_mul = I_d^v, v_add = I_a^v), with the
    gate's cosine against v_add per head as in the authors' release, padding excluded.
    """
    i = Call(*tensors, **options)
    q, present, gate, base = i.q, i.present, i.gate, i.base
    (B, H, Tq, _), Tk = q.shape, i.k.shape[2]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (i.k, i.v))
    valid = torch.ones(B, Tk, dtype=torch.bool, device=q.device) if i.key_padding is None else i.key_padding.bool()
    k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
    k_mul, v_mul, v_add, k_add = without_missing(present, i.k_mul, i.v_mul, i.v_add, i.k_add)
    t, j = torch.arange(Tk - Tq, Tk, device=q.device)[:, None], torch.arange(Tk, device=q.device)
    seen = valid[:, None, None, :] & ((j <= t) if i.causal else (j == j))  # (B, 1, Tq, Tk)
    if i.window is not None:
        seen = seen & ((t - j).abs() < i.window)

    dot, square, count = (v * v_add[..., None, :]).sum(-1), v.square().sum(-1), valid[:, None].to(v.dtype)
    if gate == "sequence":
        dot, square, count = (x.sum(-1)[..., None, None] for x in (dot, square, count))
    elif gate == "prefix":
        dot, square, count = (x.cumsum(-1)[..., Tk - Tq :, None] for x in (dot, square, count))
    else:
        dot, square, count = dot[..., None, :], square[..., None, :], torch.ones_like(count)[..., None, :]
    cos = dot / (square * count * v_add.square().sum(-1)[..., None, None] + i.eps**2).sqrt()  # (M, B, H, Tq|1, Tk|1)
    logit = i.head_logit[:, None, :, None, None].expand(-1, B, -1, 1, 1)
    logit = logit if present is None else logit.masked_fill(~present[:, :, None, None, None], float("-inf"))
    g = torch.sigmoid(logit + cos if gate in GATES[:3] else logit)[..., None]
    g = torch.ones_like(g) if gate == "none" else g
    g = g if present is None else g.masked_fill(~present[:, :, None, None, None, None], 0)

    base = base.view(B, 1, 1, 1, 1) if isinstance(base, Tensor) else base
    k_mul, v_mul, v_add = (x[:, :, :, None, None] for x in (k_mul, v_mul, v_add))
    k_add = torch.zeros_like(k_mul) if k_add is None else k_add[:, :, :, None, None]
    k_infused = base * k[:, :, None] + (g * (k[:, :, None] * k_mul + k_add)).sum(0)  # (B, H, Tq|1, Tk, d)
    v_infused = base * v[:, :, None] + (g * (v[:, :, None] * v_mul + v_add)).sum(0)
    scores = (q[:, :, :, None] * k_infused).sum(-1) * i.scale
    scores = scores if i.softcap is None else i.softcap * torch.tanh(scores / i.softcap)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    weights = torch.where(seen, weights, 0)  # a row without visible keys is NaN here, and 0 by definition
    return (weights[..., None] * v_infused).sum(-2)
