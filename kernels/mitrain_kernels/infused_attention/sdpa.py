"""Infused attention on a CPU: folded around torch's attention, with a backward pass of its own.

The mathematics is at ``infused_attention_folded``; here no step of it is recorded by autograd. With A the plain
attention on q' = q ⊙ α and dO the upstream gradient:

    dA = dO ⊙ γ            (dq', dK, dV) = plain attention backward of dA        dq = dq' ⊙ α
    d k_mul = Σ_t g_t dq'_t ⊙ q_t        d v_mul = Σ_t g_t dO_t ⊙ A_t            d v_add = Σ_t g_t dO_t + through the gate
    dg_t = (dq'_t ⊙ q_t)·k_mul + (dO_t ⊙ A_t)·v_mul + dO_t·v_add

Kept for backward beyond what plain attention keeps: the gate's few scalars per query, head and modality.

Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mitrain_kernels.infused_attention.affine import Maps, cast, infuse_output, infuse_query, visible
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
    products,
    same_gate,
    whole_sums,
)
from mitrain_kernels.infused_attention.hidden import finite, without_hidden, without_missing
from mitrain_kernels.infused_attention.sdpa_backward import Outside, attention_backward


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

    What padding or a missing modality hides is looked at only where the output is not finite, which NaN makes it.
    """
    found = forward_once(inputs, setting, before, trains)
    if not hides(setting) or finite(found[0]):
        return found
    return forward_once(shown(inputs, setting), setting, before, trains)


def hides(setting: Setting) -> bool:
    return setting.valid is not None or setting.present is not None


def shown(inputs: Sequence[Tensor | None], setting: Setting) -> list[Tensor | None]:
    """The inputs with 0 for what is hidden and could spread."""
    tokens = (without_hidden(x, setting.valid) for x in inputs[:3])
    return [*tokens, *without_missing(setting.present, *inputs[3:6]), *inputs[6:]]


def forward_once(
    inputs: Sequence[Tensor | None], setting: Setting, before: GateSums | None, trains: bool
) -> tuple[Tensor, ...]:
    q, k, v, *maps = inputs[:7]
    dtype, exact = k.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, maps = rows(q), rows(k), rows(v), Maps(*cast(maps, exact))
    sums = gate_sums(maps, v, q.shape[2], setting, before)
    gate = make_gate(maps, sums, setting, q.shape[2])
    g = visible(gate.value, setting)
    inner = infuse_query(*cast([q], exact), g, maps, setting.base)
    ordered = setting.causal and setting.mask is None and q.shape[2] > 1
    options = {"attn_mask": setting.mask, "scale": setting.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    inner = inner if inner.dtype == dtype else inner.to(dtype)
    attended = F.scaled_dot_product_attention(inner, k, v, is_causal=ordered, **options)
    output = infuse_output(*cast([attended], exact), g, maps, setting.base)
    output = output if output.dtype == dtype else output.to(dtype)
    kept = [g.new_empty(0) for _ in range(3)] if sums is None else sums
    attended = attended if trains else attended.new_empty(0)
    return output, attended, g.new_empty(0), gate.cosine, gate.root, *kept


def like_output(q: Tensor, modalities: int, kind: str) -> Tensor:
    """An empty tensor in the layout of the output, which is that of q ⊙ α."""
    own = modalities > 0 and (kind == "prefix" or q.shape[2] == 1)
    return q.new_empty(q.shape) if own else torch.empty_like(rows(q))


def rows(x: Tensor) -> Tensor:
    """x with adjacent columns, without which torch's attention on a CPU is slow."""
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

    logsumexp: empty, the weights are computed from the scores again. kept: the gate's cosine and root, and its sums'
    square and count. continued: the sums went on from a state, so that only the queries' own values are in them.
    """
    rest = (attended, kept, continued, needs)
    found = backward_once(upstream, inputs, setting, *rest)
    _, dk, dv, dk_mul, _, dv_add, dlogit, _ = (
        found  # sums over the queries: what is wrong in a row shows in one of them
    )
    if not hides(setting) or finite(dk, dv, dk_mul, dv_add, dlogit):
        return found
    return backward_once(without_hidden(upstream, setting.valid), shown(inputs, setting), setting, *rest)


def backward_once(
    upstream: Tensor,
    inputs: Sequence[Tensor | None],
    setting: Setting,
    attended: Tensor,
    kept: Sequence[Tensor],
    continued: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    q, k, v, *maps = inputs[:7]
    maps = Maps(*cast(maps, torch.promote_types(q.dtype, torch.float32)))
    cosine, root, square, count = kept
    has_cosine = setting.kind in ("sequence", "prefix")
    gate = (
        same_gate(maps.head_logit, cosine, root, setting.present)
        if has_cosine
        else make_gate(maps, None, setting, q.shape[2])
    )
    found = attention_backward(Outside(upstream, q, k, v, attended, visible(gate.value, setting), maps, setting, needs))
    dmaps = [x.clone(memory_format=torch.contiguous_format) for x in found.dmaps.permute(0, 3, 1, 2, 4)]
    dg = found.dgate.permute(2, 0, 1, 3)
    if setting.sees is not None:
        dg = dg * setting.sees
    if gate.value.shape[-1] < dg.shape[-1]:
        dg = dg.sum(-1, keepdim=True)
    if has_cosine:
        new = gate.value.shape[-1]
        back = gate_backward(
            dg, gate, square[..., -new:], count[..., -new:], maps.v_add, *summed(v, setting, continued, new)
        )
        dlogit = through_cosine(back, maps.v_add, v, found.dv, dmaps[-1])
    else:
        slope = torch.ops.aten.sigmoid_backward(dg, gate.value) if setting.kind == "head" else torch.zeros_like(dg)
        dlogit = slope.sum((1, 3))
    return [found.dq, found.dk, found.dv, *dmaps, dlogit, None]


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
