"""Infused attention folded around torch's CPU flash attention, with its backward pass written out.

The mathematics is at ``infused_attention_folded``; here no step of it is recorded by autograd. With A the plain
attention on q' = q ⊙ α and dO the upstream gradient:

    dA = dO ⊙ γ            (dq', dK, dV) = plain attention backward of dA        dq = dq' ⊙ α
    d k_mul = Σ_t g_t dq'_t ⊙ q_t        d v_mul = Σ_t g_t dO_t ⊙ A_t            d v_add = Σ_t g_t dO_t + through the gate
    dg_t = (dq'_t ⊙ q_t)·k_mul + (dO_t ⊙ A_t)·v_mul + dO_t·v_add

Kept for backward beyond what plain attention keeps: three scalars per query, head and modality.

This file is the only one that calls torch's flash operators for the CPU, which are not part of its public API.
Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.call import Setting
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
    same_gate,
    whole_sums,
)
from mitrain_kernels.infused_attention.workspace import workspace

FLASH = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
FLASH_SCHEMAS = {
    FLASH[0]: "query key value dropout_p is_causal attn_mask scale",
    FLASH[1]: "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",
}


def flash_is_known() -> bool:
    """Whether this torch has the CPU flash operators with the arguments that are used here."""
    for name, arguments in FLASH_SCHEMAS.items():
        packet = getattr(torch.ops.aten, name, None)
        if packet is None or " ".join(a.name for a in packet.default._schema.arguments) != arguments:
            return False
    return True


class Maps(NamedTuple):
    """k_mul, v_mul, v_add (M, B, H, d) and head_logit (M, H), in the precision of the computation."""

    k_mul: Tensor
    v_mul: Tensor
    v_add: Tensor
    head_logit: Tensor


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


def weighted(gate: Tensor, vectors: Tensor, out: Tensor | None = None) -> Tensor | None:
    """Σ_m g_m x_m (B, H, T', d) of gate (M, B, H, T') and vectors (M, B, H, d); None without modalities."""
    total = None
    for g, x in zip(gate[..., None], vectors[..., None, :], strict=True):
        total = torch.mul(g, x, out=out) if total is None else total.addcmul_(g, x)
    return total


def scaled(x: Tensor, factor: Tensor | None, base: Tensor | float, out: Tensor | None = None) -> Tensor:
    """x ⊙ (base + factor); x (B, H, T, d), factor as ``weighted`` gives it."""
    if isinstance(base, float) and base == 1:
        return x if factor is None else torch.addcmul(x, x, factor, out=out)
    rows = base[:, None, None, None] if isinstance(base, Tensor) else base
    return torch.mul(x, rows if factor is None else factor + rows, out=out)


def same_shape(x: Tensor | None, y: Tensor) -> bool:
    return x is not None and x.shape == y.shape


def visible(gate: Tensor, setting: Setting) -> Tensor:
    """The gate (M, B, H, T'), 0 for queries that see no key."""
    return gate if setting.sees is None else gate * setting.sees


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def forward(inputs: Sequence[Tensor], setting: Setting, before: GateSums | None, trains: bool) -> tuple[Tensor, ...]:
    """The output, plain attention's A and log-sum-exp, the gate's cosine and root, its sums (empty without a cosine).

    inputs: q, k, v, k_mul, v_mul, v_add, head_logit, and a k_add that is dead here. Attention itself runs in q's type,
    everything around it in at least float32. trains: a backward pass needs A and the log-sum-exp (else they are empty).
    """
    q, k, v, maps = prepared(inputs)
    dtype, exact = k.dtype, maps.v_add.dtype
    sums = gate_sums(maps, v, q.shape[2], setting, before)
    gate = make_gate(maps, sums, setting, q.shape[2])
    g = visible(gate.value, setting)
    factor = weighted(g, maps.k_mul, out=workspace.take("factor", g, q.shape) if g.shape[-1] == q.shape[2] else None)
    inner = scaled(q.to(exact), factor, setting.base, out=factor if same_shape(factor, q) else None)
    attended, logsumexp = getattr(torch.ops.aten, FLASH[0])(
        inner.to(dtype), k, v, 0.0, setting.causal, attn_mask=additive(setting.mask, dtype), scale=setting.scale
    )
    output = infuse_output(attended.to(exact), g, maps, setting.base).to(dtype)
    kept = [g.new_empty(0) for _ in range(3)] if sums is None else sums
    attended = attended if trains else attended.new_empty(0)
    return output, attended, logsumexp if trains else logsumexp.new_empty(0), gate.cosine, gate.root, *kept


def like_results(q: Tensor, modalities: int, kind: str) -> tuple[Tensor, Tensor]:
    """Empty tensors in the layouts of the output, which is that of q ⊙ α, and of the log-sum-exp."""
    (B, H, T, _), exact = q.shape, torch.promote_types(q.dtype, torch.float32)
    own = modalities > 0 and (kind == "prefix" or T == 1)
    output = q.new_empty(q.shape) if own else torch.empty_like(rows(q))
    return output, q.new_empty(B, T, H, dtype=exact).transpose(1, 2)


def prepared(inputs: Sequence[Tensor], wide: bool = False) -> tuple[Tensor, Tensor, Tensor, Maps]:
    """q, k, v, where ``wide`` in the precision of the maps, which is at least float32."""
    q, k, v, *maps, _ = inputs
    exact = torch.promote_types(q.dtype, torch.float32)
    if wide:
        q, k, v = (x.to(exact) for x in (q, k, v))
    return rows(q), rows(k), rows(v), Maps(*(x.to(exact) for x in maps))


def rows(x: Tensor) -> Tensor:
    """x with adjacent columns, which torch's flash operators take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_major(x: Tensor) -> Tensor:
    """Scratch (B, H, T, d) that lies in memory as (B, T, H, d): torch's operator copies any other upstream gradient."""
    B, H, T, d = x.shape
    return workspace.take("upstream", x, (B, T, H, d)).transpose(1, 2)


def infuse_output(attended: Tensor, gate: Tensor, maps: Maps, base: Tensor | float) -> Tensor:
    """A ⊙ γ + δ = base A + Σ_m g_m (A ⊙ v_mul_m + v_add_m), a new tensor."""
    total = attended if isinstance(base, float) and base == 1 else scaled(attended, None, base)
    for g, mul, add in zip(gate[..., None], maps.v_mul[..., None, :], maps.v_add[..., None, :], strict=True):
        infused = torch.addcmul(add, attended, mul)
        total = torch.addcmul(total, infused, g, out=infused)
    return total.clone() if total is attended else total


def backward(
    upstream: Tensor,
    inputs: Sequence[Tensor],
    setting: Setting,
    attended: Tensor,
    logsumexp: Tensor,
    kept: Sequence[Tensor],
    continued: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the inputs, computed in at least float32: torch's CPU operator is slow in bfloat16 (4.5 ×).

    kept: the gate's cosine and root, and its sums' square and count. continued: the sums went on from a state, so that
    only the queries' own values are in them. torch's operator has no use for ``needs``: it makes dK and dV in any case.
    """
    dtype = inputs[0].dtype
    q, k, v, maps = prepared(inputs, wide=True)
    if upstream.dtype != q.dtype:
        upstream, attended, logsumexp = (x.to(q.dtype) for x in (upstream, attended, logsumexp))
    cosine, root, square, count = kept
    has_cosine = setting.kind in ("sequence", "prefix")
    gate = (
        same_gate(maps.head_logit, cosine, root, setting.present)
        if has_cosine
        else make_gate(maps, None, setting, q.shape[2])
    )
    g = visible(gate.value, setting)
    scratch = workspace.take("product", q, q.shape)  # serves γ, then q', then the products that are reduced
    each = g.shape[-1] == q.shape[2]
    outer_factor = weighted(g, maps.v_mul, out=scratch if each else None)
    inward = scaled(upstream, outer_factor, setting.base, out=token_major(q))
    inner_factor = weighted(g, maps.k_mul, out=workspace.take("factor", q, q.shape) if each else None)
    inner = scaled(q, inner_factor, setting.base, out=scratch)
    dinner, dk, dv = getattr(torch.ops.aten, FLASH[1])(
        inward,
        inner if dtype == q.dtype else inner.to(dtype).to(q.dtype),  # as the forward pass rounded it
        k,
        v,
        attended,
        logsumexp,
        0.0,
        setting.causal,
        attn_mask=additive(setting.mask, q.dtype),
        scale=setting.scale,
    )
    dmaps, dg = map_gradients(upstream, dinner, q, attended, g, maps, scratch)
    dq = scaled(dinner, inner_factor, setting.base, out=dinner)
    if setting.sees is not None:
        dg = dg * setting.sees
    if gate.value.shape[-1] < dg.shape[-1]:
        dg = dg.sum(-1, keepdim=True)
    if has_cosine:
        new = gate.value.shape[-1]
        back = gate_backward(
            dg, gate, square[..., -new:], count[..., -new:], maps.v_add, *summed(v, setting, continued, new)
        )
        dlogit = through_cosine(back, maps.v_add, v, dv, dmaps[-1])
    else:
        slope = torch.ops.aten.sigmoid_backward(dg, gate.value) if setting.kind == "head" else torch.zeros_like(dg)
        dlogit = slope.sum((1, 3))
    return [dq, dk, dv, *dmaps, dlogit, None]


def map_gradients(
    upstream: Tensor, dinner: Tensor, q: Tensor, attended: Tensor, gate: Tensor, maps: Maps, scratch: Tensor
) -> tuple[list[Tensor], Tensor]:
    """d k_mul, d v_mul, d v_add for a given gate, (M, B, H, d) each, and dg (M, B, H, Tq)."""
    M, (B, H, T, _) = len(gate), q.shape
    rows = gate.expand(M, B, H, T).permute(1, 2, 0, 3).reshape(B * H, M, T)
    dk_mul, dg = reduce_product(torch.mul(dinner, q, out=scratch), rows, maps.k_mul)
    dv_mul, more = reduce_product(torch.mul(upstream, attended, out=scratch), rows, maps.v_mul)
    dv_add, most = reduce_product(upstream, rows, maps.v_add)
    dg = dg.add_(more).add_(most)
    return [dk_mul, dv_mul, dv_add], dg.view(B, H, M, T).permute(2, 0, 1, 3)


def reduce_product(x: Tensor, gate: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t g_t x_t (M, B, H, d) and x_t·vector (B H, M, T) of x (B, H, T, d), gate (B H, M, T), vectors (M, B, H, d)."""
    M, B, H, d = vectors.shape
    flat = x.reshape(B * H, -1, d)
    over_tokens = torch.bmm(gate, flat).view(B, H, M, d).permute(2, 0, 1, 3)
    return over_tokens, torch.bmm(vectors.permute(1, 2, 0, 3).reshape(B * H, M, d), flat.mT)


def summed(v: Tensor, setting: Setting, continued: bool, new: int) -> tuple[int, Tensor | None]:
    """How many of the last values the sums took, and which of those count."""
    tokens = new if continued else v.shape[2]
    return tokens, None if setting.valid is None else setting.valid[:, -tokens:]


def through_cosine(back: GateGradients, v_add: Tensor, v: Tensor, dv: Tensor, dv_add: Tensor) -> Tensor:
    """Add to dv and dv_add, in place, what the gate's cosine sends to the last values; returns dL/d head_logit."""
    M, _, H, _ = v_add.shape
    tokens = back.square.shape[-1]
    values, part = v[:, :, -tokens:], dv[:, :, -tokens:]
    dv_add += by_modality(back.dot @ values, M, H)
    dv_add.addcmul_(v_add, back.norm[..., None], value=-1)
    part += torch.matmul(back.dot.mT, by_group(v_add, v.shape[1]))
    part.addcmul_(values, back.square[..., None], value=-1)
    return back.head_logit
