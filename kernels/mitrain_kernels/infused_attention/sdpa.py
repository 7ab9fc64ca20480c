"""Infused attention on a CPU: folded around torch's own attention, forward and backward.

The mathematics is at ``infused_attention_folded``; here no step of it is recorded by autograd. With A the plain
attention on q' = q ⊙ α and dO the upstream gradient:

    dA = dO ⊙ γ            (dq', dK, dV) = plain attention backward of dA        dq = dq' ⊙ α
    d k_mul = Σ_t g_t dq'_t ⊙ q_t        d v_mul = Σ_t g_t dO_t ⊙ A_t            d v_add = Σ_t g_t dO_t + through the gate
    dg_t = (dq'_t ⊙ q_t)·k_mul + (dO_t ⊙ A_t)·v_mul + dO_t·v_add

Kept for backward beyond what plain attention keeps (inputs, A, log-sum-exp): the gate's few scalars per query, head and
modality. q', α, γ and δ are computed again, which costs less than keeping four tensors of the size of q.

Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.folded import coefficients, rows_that_see, visible_keys
from mitrain_kernels.infused_attention.gate import (
    Gate,
    GateGradients,
    GateSums,
    by_group,
    by_modality,
    constant_gate,
    cosine_gate,
    finite,
    gate_backward,
    gate_sums,
    products,
    same_gate,
    without_hidden,
    without_missing,
)
from mitrain_kernels.infused_attention.reference import Call

aten = torch.ops.aten


def attention_options(call: Call, sees: Tensor | None, dtype: torch.dtype) -> dict:
    """Of torch's attention operator, whose mask is additive and of the queries' type.

    sees (B, 1, Tq) bool: the queries that see a key.
    """
    mask, (tq, tk) = call.mask, (call.q.shape[2], call.k.shape[2])
    if mask is None and (call.key_padding is not None or call.window is not None or (call.causal and 1 < tq < tk)):
        mask = visible_keys(call)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    elif mask is not None and sees is not None:
        # a row of one finite number, however low, is a row of equal scores
        mask = mask.masked_fill(~sees[..., None], float("-inf"))
    return {
        "dropout_p": 0.0,
        "is_causal": call.causal and mask is None and tq > 1,
        "attn_mask": mask if mask is None else mask.to(dtype),
        "scale": call.scale,
    }


def gates_of(call: Call) -> tuple[GateSums | None, Gate]:
    """The gate's sums for the new tokens, None without a cosine, and the gates of the queries."""
    values, valid = call.new_values
    sums = gate_sums(call.gate, values, call.v_add, valid, call.state_in)
    return sums, make_gate(sums, call)


def make_gate(sums: GateSums | None, call: Call) -> Gate:
    """The gates of the queries, one for all where they don't differ."""
    if sums is not None:
        return cosine_gate(call.head_logit, call.v_add, sums.last(call.q.shape[2]), call.present, call.eps)
    value = constant_gate(call.head_logit, call.v_add.shape[1], call.present, cosine=call.gate == "head")
    return Gate(value, value.new_empty(0), value.new_empty(0))


def prepared(call: Call) -> Call:
    """The call with its maps in the precision of the computation, and 0 for those of missing modalities."""
    exact = torch.promote_types(call.q.dtype, torch.float32)
    # Not only where the output shows it: a huge number there can hide from it and yet spoil the kept cosine.
    maps = without_missing(call.present, call.k_mul, call.v_mul, call.v_add)
    named = zip(call.maps, (*maps, call.head_logit), strict=True)
    return replace(call, **{name: x.to(exact) for name, x in named})


def shown(call: Call) -> Call:
    """The call with 0 for what padding hides and could spread."""
    return replace(call, **{name: without_hidden(getattr(call, name), call.key_padding) for name in ("q", "k", "v")})


def forward(
    call: Call, gates: tuple[GateSums | None, Gate], trains: bool, clean: bool = False
) -> tuple[Tensor, ...]:  # fmt: skip
    """The output, plain attention's A and log-sum-exp, the gate's cosine and root, its sums (empty without a cosine).

    call: ``prepared``, k_add dead. Attention itself runs in q's type, everything around it in at least float32.
    trains: a backward pass needs A and log-sum-exp (else they are empty).

    What padding hides is looked at only where the output is not finite, which NaN makes it; ``clean``: it was.
    """
    dtype, exact = call.q.dtype, torch.promote_types(call.q.dtype, torch.float32)
    (sums, gate), sees = gates, rows_that_see(call)
    g = gate.value if sees is None else gate.value * sees
    alpha, gamma, delta = coefficients(g, call.k_mul, call.v_mul, call.v_add, call.base)
    inner = (call.q.to(exact) * alpha).to(dtype)
    # the operator behind F.scaled_dot_product_attention, which does not hand out the log-sum-exp
    attended, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        rows(inner), rows(call.k), rows(call.v), **attention_options(call, sees, dtype)
    )
    output = torch.addcmul(delta, attended.to(exact), gamma).to(dtype).contiguous()
    if call.key_padding is not None and not clean and not finite(output):
        call = shown(call)
        return forward(call, gates_of(call), trains, clean=True)
    kept = [gamma.new_empty(0) for _ in range(3)] if sums is None else sums
    if not trains:
        attended, logsumexp = attended.new_empty(0), logsumexp.new_empty(0)
    return output, attended.contiguous(), logsumexp.contiguous(), gate.cosine, gate.root, *kept


def rows(x: Tensor) -> Tensor:
    """x with adjacent columns, which torch's operator takes for granted: its public caller checks."""
    return x if x.stride(-1) == 1 else x.contiguous()


def backward(
    upstream: Tensor, call: Call, attended: Tensor, logsumexp: Tensor, kept: Sequence[Tensor], needs: Sequence[bool],
    clean: bool = False,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of q, k, v, k_mul, v_mul, v_add, head_logit, k_add (None), computed in at least float32.

    None for those of q, k, v that ``needs`` leaves out. kept: the gate's cosine and root, its sums' square and count.
    """
    dtype, exact = call.q.dtype, torch.promote_types(call.q.dtype, torch.float32)
    call, outward, (cosine, root, square, count) = prepared(call), upstream.to(exact), kept
    attended, q, k, v = (x.to(exact) for x in (attended, call.q, call.k, call.v))
    has_cosine, new, sees = call.gate in ("sequence", "prefix"), q.shape[2], rows_that_see(call)
    gate = same_gate(call.head_logit, cosine, root, call.present) if has_cosine else make_gate(None, call)
    g = gate.value if sees is None else gate.value * sees
    alpha, gamma, _ = coefficients(g, call.k_mul, call.v_mul, call.v_add, call.base)
    inner = (q * alpha).to(dtype).to(exact)  # as the forward pass rounded it, else the weights would be others
    inward = outward * gamma
    if sees is not None:
        inward = inward * sees[..., None]  # under base 1 a query without a key has a γ, but no attention
    # In float32 also where the forward pass was not: bfloat16's backward pass is several times slower without AMX.
    dinner, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        rows(inward), rows(inner), rows(k), rows(v), attended, logsumexp, **attention_options(call, sees, exact)
    )
    # Of dq' ⊙ q, dO ⊙ A and dO (3, B, H, Tq, d): against the gates the maps' gradients, against the maps the gates'.
    both = torch.stack([dinner * q, outward * attended, outward])
    vectors = torch.stack([call.k_mul, call.v_mul, call.v_add]).permute(0, 2, 3, 1, 4)
    weights = g.permute(1, 2, 0, 3)
    dmaps = (weights.expand(*weights.shape[:3], new) @ both).permute(0, 3, 1, 2, 4)
    dmaps = [x.clone(memory_format=torch.contiguous_format) for x in dmaps]
    dg = (vectors @ both.mT).sum(0).permute(2, 0, 1, 3)
    if sees is not None:
        dg = dg * sees
    if gate.value.shape[-1] < dg.shape[-1]:
        dg = dg.sum(-1, keepdim=True)
    dq = dinner * alpha if needs[0] else None
    dk, dv = (x if needed else None for x, needed in zip((dk, dv), needs[1:3], strict=True))
    if has_cosine:
        gates, (values, valid) = gate.value.shape[-1], call.new_values
        square, count = square[..., -gates:], count[..., -gates:]
        back = gate_backward(dg, gate, square, count, call.v_add, values.shape[2], valid)
        dlogit = through_cosine(back, call.v_add, v, dv, dmaps[-1])
    else:
        slope = aten.sigmoid_backward(dg, gate.value) if call.gate == "head" else torch.zeros_like(dg)
        dlogit = slope.sum((1, 3))
    # sums over the queries: what is wrong in a row shows in one of them
    if call.key_padding is not None and not clean and not finite(dk, dv, dmaps[0], dmaps[2], dlogit):
        upstream = without_hidden(upstream, call.key_padding)
        return backward(upstream, shown(call), attended, logsumexp, kept, needs, clean=True)
    return [x if x is None else x.contiguous() for x in (dq, dk, dv)] + [*dmaps, dlogit, None]


def through_cosine(back: GateGradients, v_add: Tensor, v: Tensor, dv: Tensor | None, dv_add: Tensor) -> Tensor:
    """Add to dv and dv_add, in place, what the gate's cosine sends to the last values; returns dL/d head_logit."""
    M, _, H, _ = v_add.shape
    tokens = back.square.shape[-1]
    values = v[:, :, -tokens:]
    dv_add += by_modality(products(back.dot, values), M, H)
    dv_add.addcmul_(v_add, back.norm[..., None], value=-1)
    if dv is None:
        return back.head_logit
    part = dv[:, :, -tokens:]
    part.addcmul_(values, back.square[..., None], value=-1)
    dots, adds = back.dot[..., None], by_group(v_add, v.shape[1])[..., None, :]
    for i in range(dots.shape[2]):
        part.addcmul_(dots[:, :, i], adds[:, :, i])  # an outer product of few terms: matrix products are slow at it
    return back.head_logit
