"""Infused attention folded around any attention backend: keys and values are neither modified nor copied.

With a gate that does not depend on the key, softmax attention over infused keys and values equals plain attention
on ``q ⊙ α`` followed by ``o ⊙ γ + δ`` (proof: the docstring of ``infused_attention_folded``). The gate costs one read
of V. The gate ``token`` does depend on the key: it takes the plain way, through ``infused_keys_values``.

Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mitrain_kernels.infused_attention.gate import (
    EPSILON,
    GateSums,
    constant_gate,
    full_precision,
    gate_sums,
    gate_values,
    per_query_head,
    token_sums,
    without_missing,
)
from mitrain_kernels.infused_attention.reference import GATES, Call

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    base: int | Tensor = 1,
    **gating: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], GateSums | None]:
    """(α, γ, δ) for the tokens of ``v`` (B, G, T, d), in v's dtype, and the sums that a later call continues from.

    Gate 'prefix' gives one row per token of ``v``; the other gates one row for all. gating: as of ``folded_gate``.
    """
    k_mul, v_mul, v_add = without_missing(present, k_mul, v_mul, v_add)
    values, sums = folded_gate(v, v_add, head_logit, present, **gating)
    alpha, gamma, delta = coefficients(values, k_mul, v_mul, v_add, base)
    return (alpha.to(v.dtype), gamma.to(v.dtype), delta.to(v.dtype)), sums


def folded_gate(
    v: Tensor,
    v_add: Tensor,
    head_logit: Tensor,
    present: Tensor | None,
    gate: str = "prefix",
    key_padding: Tensor | None = None,
    before: GateSums | None = None,
    eps: float = EPSILON,
) -> tuple[Tensor, GateSums | None]:
    """The gate (M, B, H, T') of the tokens of ``v``, T' = 1 where it is the same for all, and its sums after ``before``."""
    sums = gate_sums(gate, v, v_add, key_padding, before)
    if sums is None:
        return constant_gate(head_logit, v_add.shape[1], present, cosine=gate == "head"), None
    return gate_values(head_logit, v_add, sums, present, eps), sums


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
    k_mul, v_mul, v_add, k_add = without_missing(present, k_mul, v_mul, v_add, k_add)
    gate = gate_values(head_logit, v_add, token_sums(v, v_add, None), present, eps)
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


def visible_keys(call: Call) -> Tensor | None:
    """Which keys each query sees, (B or 1, 1, Tq, Tk) bool; None when all queries see all keys."""
    tq, tk, causal, window = call.q.shape[2], call.k.shape[2], call.causal, call.window
    seen = torch.ones(1, 1, tq, tk, dtype=torch.bool, device=call.q.device)
    if causal:
        seen = seen.tril(tk - tq)
    if window is not None:
        seen = seen.triu(tk - tq - window + 1)
        seen = seen if causal else seen.tril(tk - tq + window - 1)
    if call.key_padding is not None:
        return seen & call.key_padding[:, None, None, :]
    return seen if causal or window is not None else None


def rows_that_see(call: Call) -> Tensor | None:
    """(B, 1, Tq) bool: the queries that see any key; None when all do."""
    if call.key_padding is None:
        return None
    tk, window = call.k.shape[2], call.window
    so_far = F.pad(call.key_padding.long().cumsum(-1), (1, 0))  # (B, Tk + 1): tokens before a position
    position = torch.arange(tk - call.q.shape[2], tk, device=so_far.device)
    first = (position + 1 - window).clamp(min=0) if window else torch.zeros_like(position)
    last = position if call.causal else (position + (window or tk) - 1).clamp(max=tk - 1)
    return (so_far[:, last + 1] > so_far[:, first])[:, None]


def plain_attention(call: Call, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Attention by torch's SDPA, or written out where the call's softcap asks for it; rows that see nothing return 0.

    ``bias`` (B, H, Tq or 1, 1) joins the scores of a query before the softcap; without one it would not matter.
    """
    scale, cap, heads = call.scale, call.softcap, q.shape[1]
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=heads != k.shape[1])
    k, v = per_query_head(k, heads), per_query_head(v, heads)
    scores = q @ k.mT if bias is None else q @ k.mT + bias
    scores = cap * torch.tanh(scores * scale / cap)
    if seen is None:
        return torch.softmax(scores, dim=-1) @ v
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.where(seen, weights, 0) @ v


def infused_attention_folded(*tensors: Tensor, attend: Attend | None = None, **options: Any) -> Tensor:
    r"""``infused_attention_reference`` over any attention; same arguments, same result, K and V untouched.

    For a gate that is constant over the keys j (it may depend on sample, head and query t):

        q_t·K'_j = (q_t ⊙ α_t)·K_j + β_t          β_t = Σ_m g_mt q_t·k_add_m is the same for all j: softmax drops it
        Σ_j p_tj V'_j = (Σ_j p_tj V_j) ⊙ γ_t + δ_t, because Σ_j p_tj = 1

    where α, γ, δ are given at ``coefficients``. Hence k_add is dead: its gradient is explicit zeros. A softcap bends
    q·K' before the softmax, and β is alive.
    ``attend(q, k, v)`` returns softmax attention (B, H, Tq, d) and has the mask, scale and softcap built in; by default
    torch's scaled_dot_product_attention. It must not drop probabilities. A query that sees no key returns 0.

    Raises ValueError for an unknown gate, and for k_add under a softcap (where it is alive) with ``attend``.
    """
    i = Call(*tensors, **options)
    q, gate = i.q, i.gate
    if gate not in GATES:
        raise ValueError(f"gate {gate!r} is unknown: choose one of {', '.join(GATES)}")
    bent = i.k_add is not None and not i.k_add_is_dead and gate != "token"
    if attend is not None and bent:
        raise ValueError("k_add is alive under a softcap, and attend(q, k, v) does not take it: leave attend out")
    seen = visible_keys(i) if attend is None else None
    plain = attend or (lambda q, k, v: plain_attention(i, q, k, v, seen))
    if gate == "token":
        how = {"k_add": i.k_add, "present": i.present, "base": i.base, "eps": i.eps}
        return plain(q, *infused_keys_values(i.k, i.v, **i.maps, **how))
    k_mul, v_mul, v_add, k_add = without_missing(i.present, i.k_mul, i.v_mul, i.v_add, i.k_add)
    v, valid = i.new_values
    values, _ = folded_gate(v, v_add, i.head_logit, i.present, gate, valid, i.state_in, i.eps)
    values = values[..., -q.shape[2] :]
    alpha, gamma, delta = (x.to(q.dtype) for x in coefficients(values, k_mul, v_mul, v_add, i.base))
    sees = rows_that_see(i)
    delta = delta if sees is None else delta * sees[..., None]
    if bent:
        moved = (q * coefficients(values, k_mul, v_mul, k_add)[2].to(q.dtype)).sum(-1, keepdim=True)
        return torch.addcmul(delta, plain_attention(i, q * alpha, i.k, i.v, seen, moved), gamma)
    return keep_dead(torch.addcmul(delta, plain(q * alpha, i.k, i.v), gamma), i.k_add)
