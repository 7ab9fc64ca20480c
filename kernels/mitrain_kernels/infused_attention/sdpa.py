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
from typing import NamedTuple

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.call import Setting
from mitrain_kernels.infused_attention.folded import coefficients
from mitrain_kernels.infused_attention.gate import (
    Gate,
    GateGradients,
    GateSums,
    by_group,
    by_modality,
    constant_gate,
    cosine_gate,
    gate_backward,
    prefix_sums,
    products,
    same_gate,
    whole_sums,
)
from mitrain_kernels.infused_attention.hidden import finite, without_hidden, without_missing

aten = torch.ops.aten


class Maps(NamedTuple):
    """k_mul, v_mul, v_add (M, B, H, d) and head_logit (M, H), in the precision of the computation."""

    k_mul: Tensor
    v_mul: Tensor
    v_add: Tensor
    head_logit: Tensor


def visible(gate: Tensor, setting: Setting) -> Tensor:
    """The gate (M, B, H, T'), 0 for queries that see no key."""
    return gate if setting.sees is None else gate * setting.sees


def attention_options(setting: Setting, queries: int, dtype: torch.dtype) -> dict:
    """Of torch's attention operator, whose mask is additive and of the queries' type."""
    mask = setting.mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return {
        "dropout_p": 0.0,
        "is_causal": setting.causal and mask is None and queries > 1,
        "attn_mask": mask if mask is None else mask.to(dtype),
        "scale": setting.scale,
    }


def gate_sums(maps: Maps, v: Tensor, new: int, setting: Setting, before: GateSums | None) -> GateSums | None:
    """The sums that the gates of the ``new`` last tokens of v (B, G, Tk, d) are made of; None without a cosine."""
    valid = setting.valid
    if setting.kind == "sequence":
        return whole_sums(v, maps.v_add, valid)
    if setting.kind != "prefix":
        return None
    start = -new if before is not None else 0
    return prefix_sums(v[:, :, start:], maps.v_add, None if valid is None else valid[:, start:], before)


def make_gate(maps: Maps, sums: GateSums | None, setting: Setting, new: int) -> Gate:
    """The gates of the ``new`` last tokens, one for all where they don't differ."""
    if sums is not None:
        last = sums.last(new)
        return cosine_gate(maps.head_logit, maps.v_add, last, setting.present, setting.eps)
    value = constant_gate(maps.head_logit, maps.v_add.shape[1], setting.present, cosine=setting.kind == "head")
    return Gate(value, value.new_empty(0), value.new_empty(0))


def forward(
    inputs: Sequence[Tensor | None], setting: Setting, before: GateSums | None, trains: bool
) -> tuple[Tensor, ...]:
    """The output, plain attention's A, an empty tensor, the gate's cosine and root, its sums (empty without a cosine).

    inputs: q, k, v, k_mul, v_mul, v_add, head_logit, and a k_add that is dead here. Attention itself runs in q's type,
    everything around it in at least float32. trains: a backward pass needs A (else it is empty).

    What padding hides is looked at only where the output is not finite, which NaN makes it.
    """
    inputs = without_missing_maps(inputs, setting)
    found = forward_once(inputs, setting, before, trains)
    if setting.valid is None or finite(found[0]):
        return found
    return forward_once(shown(inputs, setting), setting, before, trains)


def without_missing_maps(inputs: Sequence[Tensor | None], setting: Setting) -> list[Tensor | None]:
    # Always, as the maps are small: a huge number there can hide from the output and yet spoil the kept cosine.
    return [*inputs[:3], *without_missing(setting.present, *inputs[3:6]), *inputs[6:]]


def shown(inputs: Sequence[Tensor | None], setting: Setting) -> list[Tensor | None]:
    """The inputs with 0 for what padding hides and could spread."""
    return [*(without_hidden(x, setting.valid) for x in inputs[:3]), *inputs[3:]]


def forward_once(
    inputs: Sequence[Tensor | None], setting: Setting, before: GateSums | None, trains: bool
) -> tuple[Tensor, ...]:
    q, k, v, *maps = inputs[:7]
    dtype, exact = q.dtype, torch.promote_types(q.dtype, torch.float32)
    maps = Maps(*(x.to(exact) for x in maps))
    sums = gate_sums(maps, v, q.shape[2], setting, before)
    gate = make_gate(maps, sums, setting, q.shape[2])
    alpha, gamma, delta = coefficients(visible(gate.value, setting), *maps[:3], setting.base)
    inner = (q.to(exact) * alpha).to(dtype)
    # the operator behind F.scaled_dot_product_attention, which does not hand out the log-sum-exp
    attended, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
        rows(inner), rows(k), rows(v), **attention_options(setting, q.shape[2], dtype)
    )
    output = torch.addcmul(delta, attended.to(exact), gamma).to(dtype).contiguous()
    kept = [gamma.new_empty(0) for _ in range(3)] if sums is None else sums
    if not trains:
        attended, logsumexp = attended.new_empty(0), logsumexp.new_empty(0)
    return output, attended.contiguous(), logsumexp.contiguous(), gate.cosine, gate.root, *kept


def rows(x: Tensor) -> Tensor:
    """x with adjacent columns, which torch's operator takes for granted: its public caller checks."""
    return x if x.stride(-1) == 1 else x.contiguous()


def backward(
    upstream: Tensor,
    inputs: Sequence[Tensor | None],
    setting: Setting,
    attended: Tensor,
    logsumexp: Tensor,
    kept: Sequence[Tensor],
    continued: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the inputs, computed in at least float32; None for those of q, k, v that ``needs`` leaves out.

    kept: the gate's cosine and root, and its sums' square and count. continued: the sums went on from a state, so that
    only the queries' own values are in them.
    """
    inputs, rest = without_missing_maps(inputs, setting), (attended, logsumexp, kept, continued, needs)
    found = backward_once(upstream, inputs, setting, *rest)
    # sums over the queries: what is wrong in a row shows in one of them
    _, dk, dv, dk_mul, _, dv_add, dlogit, _ = found
    if setting.valid is None or finite(dk, dv, dk_mul, dv_add, dlogit):
        return found
    return backward_once(without_hidden(upstream, setting.valid), shown(inputs, setting), setting, *rest)


def backward_once(
    upstream: Tensor,
    inputs: Sequence[Tensor | None],
    setting: Setting,
    attended: Tensor,
    logsumexp: Tensor,
    kept: Sequence[Tensor],
    continued: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    dtype, exact = inputs[0].dtype, torch.promote_types(inputs[0].dtype, torch.float32)
    upstream, attended, q, k, v, *maps = (x.to(exact) for x in (upstream, attended, *inputs[:7]))
    maps, (cosine, root, square, count) = Maps(*maps), kept
    has_cosine, new = setting.kind in ("sequence", "prefix"), q.shape[2]
    kept_gate = same_gate(maps.head_logit, cosine, root, setting.present) if has_cosine else None
    gate = kept_gate or make_gate(maps, None, setting, new)
    g = visible(gate.value, setting)
    alpha, gamma, _ = coefficients(g, *maps[:3], setting.base)
    inner = (q * alpha).to(dtype).to(exact)  # as the forward pass rounded it, else the weights would be others
    inward = upstream * gamma
    if setting.sees is not None:
        inward = inward * setting.sees[..., None]  # under base 1 a query without a key has a γ, but no attention
    # In float32 also where the forward pass was not: bfloat16's backward pass is several times slower without AMX.
    dinner, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        rows(inward), rows(inner), rows(k), rows(v), attended, logsumexp, **attention_options(setting, new, exact)
    )
    # Of dq' ⊙ q, dO ⊙ A and dO (3, B, H, Tq, d): against the gates the maps' gradients, against the maps the gates'.
    both = torch.stack([dinner * q, upstream * attended, upstream])
    vectors, weights = torch.stack(maps[:3]).permute(0, 2, 3, 1, 4), g.permute(1, 2, 0, 3)
    dmaps = (weights.expand(*weights.shape[:3], new) @ both).permute(0, 3, 1, 2, 4)
    dmaps = [x.clone(memory_format=torch.contiguous_format) for x in dmaps]
    dg = (vectors @ both.mT).sum(0).permute(2, 0, 1, 3)
    if setting.sees is not None:
        dg = dg * setting.sees
    if gate.value.shape[-1] < dg.shape[-1]:
        dg = dg.sum(-1, keepdim=True)
    dq = dinner * alpha if needs[0] else None
    dk, dv = (x if needed else None for x, needed in zip((dk, dv), needs[1:3], strict=True))
    if has_cosine:
        new = gate.value.shape[-1]
        back = gate_backward(
            dg, gate, square[..., -new:], count[..., -new:], maps.v_add, *summed(v, setting, continued, new)
        )
        dlogit = through_cosine(back, maps.v_add, v, dv, dmaps[-1])
    else:
        slope = aten.sigmoid_backward(dg, gate.value) if setting.kind == "head" else torch.zeros_like(dg)
        dlogit = slope.sum((1, 3))
    return [x if x is None else x.contiguous() for x in (dq, dk, dv)] + [*dmaps, dlogit, None]


def summed(v: Tensor, setting: Setting, continued: bool, new: int) -> tuple[int, Tensor | None]:
    """How many of the last values the sums took, and which of those count."""
    tokens = new if continued else v.shape[2]
    return tokens, None if setting.valid is None else setting.valid[:, -tokens:]


def through_cosine(back: GateGradients, v_add: Tensor, v: Tensor, dv: Tensor | None, dv_add: Tensor) -> Tensor:
    """Add to dv and dv_add, in place, what the gate's cosine sends to the last values; returns dL/d head_logit."""
    M, _, H, _ = v_add.shape
    tokens = back.square.shape[-1]
    values = v if v.dtype == v_add.dtype else v.to(v_add.dtype)
    values = values if values.shape[2] == tokens else values[:, :, -tokens:]
    dv_add += by_modality(products(back.dot, values), M, H)
    dv_add.addcmul_(v_add, back.norm[..., None], value=-1)
    if dv is None:
        return back.head_logit
    part = dv if dv.shape[2] == tokens else dv[:, :, -tokens:]
    part.addcmul_(values, back.square[..., None], value=-1)
    dots, adds = back.dot[..., None], by_group(v_add, v.shape[1])[..., None, :]
    for i in range(dots.shape[2]):
        part.addcmul_(dots[:, :, i], adds[:, :, i])  # an outer product of few terms: matrix products are slow at it
    return back.head_logit
