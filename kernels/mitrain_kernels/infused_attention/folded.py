"""Infused attention folded around any attention backend: keys and values are neither modified nor copied.

With a gate that does not depend on the key, softmax attention over infused keys and values equals plain attention
on ``q ⊙ α`` followed by ``o ⊙ γ + δ`` (proof: the docstring of ``infused_attention_folded``). The gate costs one read
of V. The gate ``token`` does depend on the key: it takes the plain way, through ``infused_keys_values``.

Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mitrain_kernels.infused_attention.reference import EPSILON, GATES

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TEXT_GATES = ("sequence", "prefix")


class GateSums(NamedTuple):
    """What a gate needs to know of the values up to a token; with T = 1 it is the state that decoding carries on.

    where: ``dot`` (M, B, H, T) = Σ V·v_add, ``square`` (B, G, T) = Σ ‖V‖², ``count`` (B, T) = number of valid tokens;
    each at least float32.
    """

    dot: Tensor
    square: Tensor
    count: Tensor

    def last(self) -> "GateSums":
        return GateSums(*(x[..., -1:] for x in self))


def full_precision(x: Tensor) -> torch.autocast:
    """A region in which autocast leaves the gate's arithmetic alone (bfloat16 sums err by 6e-4 at 8192 tokens)."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """(B, G, ...) to (B, H, ...): each key/value head serves H / G consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def token_sums(v: Tensor, v_add: Tensor, valid: Tensor | None) -> GateSums:
    """Each token's own contribution to the sums: v (B, G, T, d), v_add (M, B, H, d), valid (B, T) bool or None."""
    (B, G, T, d), (M, _, H, _) = v.shape, v_add.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    v, v_add = v.to(wide), v_add.to(wide)
    heads = v_add.reshape(M, B, G, H // G, d).permute(1, 2, 4, 0, 3).reshape(B, G, d, M * (H // G))
    dot = (v @ heads).reshape(B, G, T, M, H // G).permute(3, 0, 1, 4, 2).reshape(M, B, H, T)
    square = v.square().sum(-1)
    if valid is None:
        return GateSums(dot, square, torch.ones(B, T, dtype=wide, device=v.device))
    return GateSums(dot.masked_fill(~valid[:, None], 0), square.masked_fill(~valid[:, None], 0), valid.to(wide))


def prefix_sums(v: Tensor, v_add: Tensor, valid: Tensor | None = None, before: GateSums | None = None) -> GateSums:
    """The sums up to and including each token of ``v`` (B, G, T, d); ``before`` (T = 1) are those of earlier tokens."""
    with full_precision(v):
        sums = GateSums(*(x.cumsum(-1) for x in token_sums(v, v_add, valid)))
        return sums if before is None else GateSums(*(x + y for x, y in zip(sums, before, strict=True)))


def gate_values(
    head_logit: Tensor, v_add: Tensor, sums: GateSums | None, present: Tensor | None = None, eps: float = EPSILON
) -> Tensor:
    r"""g = σ(L + Σ V·v_add / √(Σ‖V‖² · n · ‖v_add‖² + eps²)) for every entry of ``sums``; without sums, σ(L).

    The eps inside the root makes v_add = 0 give σ(L) with a finite gradient. Returns (M, B, H, T), at least float32;
    present (M, B) bool: False gives 0.
    """
    with full_precision(v_add):
        (_, B, H, _), wide = v_add.shape, torch.promote_types(v_add.dtype, torch.float32)
        logit = head_logit.to(wide)[:, None, :, None].expand(-1, B, -1, -1)
        if sums is not None:
            norm = v_add.to(wide).square().sum(-1, keepdim=True)
            root = per_query_head(sums.square, H) * sums.count[:, None] * norm + eps**2
            logit = logit + sums.dot * root.rsqrt()
        return hide_missing(torch.sigmoid(logit), present)


def hide_missing(gate: Tensor, present: Tensor | None) -> Tensor:
    return gate if present is None else gate.masked_fill(~present[:, :, None, None], 0)


def coefficients(
    gate: Tensor, k_mul: Tensor, v_mul: Tensor, v_add: Tensor, base: int | Tensor = 1
) -> tuple[Tensor, Tensor, Tensor]:
    r"""α = base + Σ_m g_m k_mul_m,  γ = base + Σ_m g_m v_mul_m,  δ = Σ_m g_m v_add_m, each (B, H, T, d).

    where: gate (M, B, H, T), with T = 1 if it is the same for all queries; the maps (M, B, H, d); base 0, 1 or (B,).
    """
    with full_precision(gate):
        base = base.to(gate.dtype).view(-1, 1, 1, 1) if isinstance(base, Tensor) else base
        weights = gate.permute(1, 2, 3, 0)
        k_part, v_part, delta = (weights @ x.to(gate.dtype).permute(1, 2, 0, 3) for x in (k_mul, v_mul, v_add))
        return base + k_part, base + v_part, delta


def folded_coefficients(
    v: Tensor,
    k_mul: Tensor,
    v_mul: Tensor,
    v_add: Tensor,
    head_logit: Tensor,
    *,
    present: Tensor | None = None,
    gate: str = "prefix",
    base: int | Tensor = 1,
    key_padding: Tensor | None = None,
    before: GateSums | None = None,
    eps: float = EPSILON,
) -> tuple[tuple[Tensor, Tensor, Tensor], GateSums | None]:
    """(α, γ, δ) for the tokens of ``v`` (B, G, T, d), in v's dtype, and the sums that a later call continues from.

    Gate 'prefix' gives one row per token of ``v``; the other gates one row for all. Arguments as in the reference.
    """
    sums = None
    if gate == "none":
        shape = (*head_logit.shape[:1], *v_add.shape[1:3], 1)
        values = hide_missing(head_logit.new_ones(shape), present)
    else:
        if gate == "prefix":
            sums = prefix_sums(v, v_add, key_padding, before)
        elif gate == "sequence":
            with full_precision(v):
                sums = GateSums(*(x.sum(-1, keepdim=True) for x in token_sums(v, v_add, key_padding)))
        values = gate_values(head_logit, v_add, sums, present, eps)
    alpha, gamma, delta = coefficients(values, k_mul, v_mul, v_add, base)
    return (alpha.to(v.dtype), gamma.to(v.dtype), delta.to(v.dtype)), sums


def infused_keys_values(
    k: Tensor,
    v: Tensor,
    k_mul: Tensor,
    v_mul: Tensor,
    v_add: Tensor,
    head_logit: Tensor,
    *,
    k_add: Tensor | None = None,
    present: Tensor | None = None,
    base: int | Tensor = 1,
    eps: float = EPSILON,
) -> tuple[Tensor, Tensor]:
    """Keys and values under the gate 'token', (B, H, T, d) each: MiT's Eq. 4 read per token, so it cannot fold."""
    heads = v_add.shape[2]
    own = token_sums(v, v_add, None)
    gate = gate_values(head_logit, v_add, own, present, eps)
    alpha, gamma, delta = coefficients(gate, k_mul, v_mul, v_add, base)
    k_infused = per_query_head(k, heads) * alpha.to(k.dtype)
    if k_add is not None:
        k_infused = k_infused + coefficients(gate, k_mul, v_mul, k_add)[2].to(k.dtype)
    return k_infused, per_query_head(v, heads) * gamma.to(v.dtype) + delta.to(v.dtype)


class _KeepDead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, dead: Tensor) -> Tensor:
        ctx.dead = dead.shape, dead.dtype, dead.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.dead
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def keep_dead(output: Tensor, dead: Tensor | None) -> Tensor:
    """``output`` itself, with an explicit zero gradient for a tensor that provably has no effect on it."""
    return output if dead is None else _KeepDead.apply(output, dead)


def visible_keys(q: Tensor, k: Tensor, key_padding: Tensor | None, causal: bool, window: int | None) -> Tensor | None:
    """Which keys each query sees, (B or 1, 1, Tq, Tk) bool; None when all queries see all keys."""
    tq, tk = q.shape[2], k.shape[2]
    seen = torch.ones(1, 1, tq, tk, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(tk - tq)
    if window is not None:
        seen = seen.triu(tk - tq - window + 1)
        seen = seen if causal else seen.tril(tk - tq + window - 1)
    if key_padding is not None:
        return seen & key_padding[:, None, None, :]
    return seen if causal or window is not None else None


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention by torch's SDPA, or written out where a softcap asks for it; rows that see nothing return 0."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    k, v = per_query_head(k, q.shape[1]), per_query_head(v, q.shape[1])
    scores = softcap * torch.tanh(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) / softcap)
    if seen is None:
        return torch.softmax(scores, dim=-1) @ v
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.where(seen, weights, 0) @ v


def infused_attention_folded(
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
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    eps: float = EPSILON,
    attend: Attend | None = None,
) -> Tensor:
    r"""``infused_attention_reference`` over any attention; same arguments, same result, K and V untouched.

    For a gate that is constant over the keys j (it may depend on sample, head and query t):

        q_t·K'_j = (q_t ⊙ α_t)·K_j + β_t          β_t = Σ_m g_mt q_t·k_add_m is the same for all j: softmax drops it
        Σ_j p_tj V'_j = (Σ_j p_tj V_j) ⊙ γ_t + δ_t, because Σ_j p_tj = 1

    where α, γ, δ are given at ``coefficients``. Hence k_add is dead: its gradient is explicit zeros.
    ``attend(q, k, v)`` returns softmax attention (B, H, Tq, d) and has the mask, scale and softcap built in; by default
    torch's scaled_dot_product_attention. It must not drop probabilities. A query that sees no key returns 0.

    Raises ValueError for an unknown gate and for k_add under a softcap, where k_add is alive.
    """
    if gate not in GATES:
        raise ValueError(f"gate {gate!r} is unknown: choose one of {', '.join(GATES)}")
    seen = visible_keys(q, k, key_padding, causal, window)
    attend = attend or (lambda q, k, v: plain_attention(q, k, v, seen, scale, softcap))
    maps = {"k_mul": k_mul, "v_mul": v_mul, "v_add": v_add, "head_logit": head_logit}
    if gate == "token":
        return attend(q, *infused_keys_values(k, v, **maps, k_add=k_add, present=present, base=base, eps=eps))
    if softcap is not None and k_add is not None:
        raise ValueError("k_add does not fold under a softcap, where it changes the scores: leave it out")
    (alpha, gamma, delta), _ = folded_coefficients(
        v, **maps, present=present, gate=gate, base=base, key_padding=key_padding, eps=eps
    )
    rows = slice(-q.shape[2], None)
    alpha, gamma, delta = (x[:, :, rows] for x in (alpha, gamma, delta))
    if seen is not None:
        delta = delta * seen.any(-1, keepdim=True)
    return keep_dead(torch.addcmul(delta, attend(q * alpha, k, v), gamma), k_add)
