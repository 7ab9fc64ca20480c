"""The gate of infused attention: from a few sums over values to one scalar per modality, head and query, and back.
Also what it must not hear: padding and missing modalities may hold anything, and NaN times a weight of 0 is NaN.

    g = σ(L + x),  x = C r,  r = (N n ‖a‖² + eps²)^(-1/2)        C = Σ_j V_j·a,  N = Σ_j ‖V_j‖²,  a = v_add

where the n sums run over the valid tokens up to the query (gate 'prefix'), over all of them ('sequence') or over the
key alone ('token'); 'head' is σ(L), 'none' is 1. The eps inside the root makes a = 0 give σ(L), gradient included.

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens, d head width, M modalities; T' is T or, where
one gate serves all queries, 1.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6
COSINE_GATES = ("sequence", "prefix", "token")
ORDINARY = 2.0**50
"""Hidden numbers below this are left alone: no product with them overflows in float32."""


class GateSums(NamedTuple):
    """What a gate needs to know of the values up to a token; with T = 1 it is the state that decoding carries on.

    where: ``dot`` (M, B, H, T) = Σ V·v_add, ``square`` (B, G, T) = Σ ‖V‖², ``count`` (B, T) = number of valid tokens;
    each at least float32.
    """

    dot: Tensor
    square: Tensor
    count: Tensor

    def last(self, tokens: int = 1) -> "GateSums":
        """Those of the ``tokens`` last tokens."""
        if self.dot.shape[-1] == tokens:
            return self
        return GateSums(*(x[..., -tokens:] for x in self))


class Gate(NamedTuple):
    """A gate g with what its backward pass needs: ``cosine`` x and ``root`` r; each (M, B, H, T')."""

    value: Tensor
    cosine: Tensor
    root: Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """A region in which autocast leaves the gate's arithmetic alone (bfloat16 sums err by 6e-4 at 8192 tokens)."""
    kind = x.device.type
    return torch.autocast(device_type=kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """(B, G, ...) to (B, H, ...): each key/value head serves H / G consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def by_group(x: Tensor, groups: int) -> Tensor:
    """(M, B, H, ...) to (B, G, M R, ...): what meets the same key/value head stands together."""
    M, B, H, *rest = x.shape
    parted = x.view(M, B, groups, H // groups, *rest)
    return parted.permute(1, 2, 0, 3, *range(4, parted.ndim)).reshape(B, groups, M * (H // groups), *rest)


def by_modality(x: Tensor, modalities: int, heads: int) -> Tensor:
    """(B, G, M R, ...) to (M, B, H, ...): the inverse of ``by_group``."""
    B, G, _, *rest = x.shape
    parted = x.view(B, G, modalities, heads // G, *rest)
    return parted.permute(2, 0, 1, 3, *range(4, parted.ndim)).reshape(modalities, B, heads, *rest)


def products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of (B, G, i, j) and (B, G, j, k), by the shortest way."""
    return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])


def token_sums(v: Tensor, v_add: Tensor, valid: Tensor | None) -> GateSums:
    """Each token's own contribution to the sums: v (B, G, T, d), v_add (M, B, H, d), valid (B, T) bool or None."""
    (B, G, T, _), (M, _, H, _) = v.shape, v_add.shape
    v, v_add = wide(v), wide(v_add)
    dot = by_modality(products(by_group(v_add, G), v.mT), M, H)
    square = torch.linalg.vector_norm(v, dim=-1).square()
    if valid is None:
        return GateSums(dot, square, square.new_ones(B, T))
    hidden = ~valid[:, None]
    return GateSums(dot.masked_fill(hidden, 0), square.masked_fill(hidden, 0), valid.to(square.dtype))


def prefix_sums(v: Tensor, v_add: Tensor, valid: Tensor | None = None, before: GateSums | None = None) -> GateSums:
    """The sums up to and including each token of ``v`` (B, G, T, d); ``before`` (T = 1) are those of earlier tokens."""
    with full_precision(v):
        sums = GateSums(*(x.cumsum(-1) for x in token_sums(v, v_add, valid)))
        return sums if before is None else GateSums(*(x + y for x, y in zip(sums, before, strict=True)))


def whole_sums(v: Tensor, v_add: Tensor, valid: Tensor | None = None) -> GateSums:
    """The sums over all tokens of ``v`` (B, G, T, d), with T = 1."""
    with full_precision(v):
        return GateSums(*(x.sum(-1, keepdim=True) for x in token_sums(v, v_add, valid)))


def opened(logit: Tensor, present: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """σ(logit) (M, B, H, T'), 0 where ``present`` (M, B) bool is False, whatever is in the logit there.

    With ``cu_seqlens`` the logit is (M, 1, H, R) and ``present`` (M, S).
    """
    if present is None:
        return torch.sigmoid(logit)
    if cu_seqlens is None:
        there = present[:, :, None, None]
    else:
        there = present.repeat_interleave(cu_seqlens.diff().long(), dim=1)[:, None, None]
    return torch.sigmoid(logit.masked_fill(~there, float("-inf")))


def cosine_gate(head_logit: Tensor, v_add: Tensor, sums: GateSums, present: Tensor | None, eps: float = EPSILON) -> Gate:
    """The gate for every entry of ``sums``, in at least float32; head_logit (M, H), v_add (M, B, H, d)."""
    (M, B, H, _), G = v_add.shape, sums.square.shape[1]
    v_add = wide(v_add)
    energy = sums.square * sums.count[:, None]
    norm = v_add.square().sum(-1).view(M, B, G, H // G, 1)
    root = (norm * energy[:, :, None] + eps**2).rsqrt().view(sums.dot.shape)
    cosine = sums.dot * root
    return same_gate(head_logit, cosine, root, present)


def same_gate(head_logit: Tensor, cosine: Tensor, root: Tensor, present: Tensor | None) -> Gate:
    """The gate again from its cosine and root."""
    return Gate(opened(cosine + head_logit[:, None, :, None], present), cosine, root)


def constant_gate(head_logit: Tensor, batch: int, present: Tensor | None, cosine: bool = True) -> Tensor:
    """The gate without a cosine, (M, B, H, 1): σ(L), or 1 for the gate 'none'."""
    logit = wide(head_logit)[:, None, :, None].expand(-1, batch, -1, -1)
    if cosine:
        return opened(logit, present)
    return torch.ones_like(logit) if present is None else present[:, :, None, None].to(logit.dtype).expand_as(logit)


def gate_sums(kind: str, v: Tensor, v_add: Tensor, valid: Tensor | None, before: GateSums | None = None) -> GateSums | None:
    """The sums over ``v`` that the gate ``kind`` is made of; None where it has no cosine."""
    if kind == "sequence":
        return whole_sums(v, v_add, valid)
    return prefix_sums(v, v_add, valid, before) if kind == "prefix" else None


def gate_values(
    head_logit: Tensor, v_add: Tensor, sums: GateSums, present: Tensor | None = None, eps: float = EPSILON
) -> Tensor:
    """g for every entry of ``sums``, (M, B, H, T'), at least float32."""
    with full_precision(v_add):
        return cosine_gate(head_logit, v_add, sums, present, eps).value


class GateGradients(NamedTuple):
    """``dot`` (B, G, M R, T) and ``square`` (B, G, T): dL/dV_j = Σ dot_j a − square_j V_j; dL/da = Σ_j dot_j V_j − norm a.

    ``norm`` is (M, B, H), ``head_logit`` (M, H).
    """

    dot: Tensor
    square: Tensor
    norm: Tensor
    head_logit: Tensor


def gate_backward(
    upstream: Tensor, gate: Gate, square: Tensor, count: Tensor, v_add: Tensor, tokens: int, valid: Tensor | None
) -> GateGradients:
    """From dL/dg (M, B, H, T') to the sums' own gradients, for each of ``tokens`` values.

    ``square`` and ``count`` are the sums of the gates. Where there are more values than gates, those before the first
    gate's token belong to every gate's sums.
    """
    (M, B, H, _), (_, G, T) = v_add.shape, square.shape
    e = torch.ops.aten.sigmoid_backward(upstream, gate.value)
    dot = e * gate.root
    w = (dot * gate.cosine).mul_(gate.root).view(M, B, G, H // G, T)
    norm, count = v_add.square().sum(-1).view(M, B, G, H // G, 1), count[:, None]
    of_norm = (w * (square * count)[:, :, None]).sum(-1).view(M, B, H)
    of_square = (w * norm).sum((0, 3)).mul_(count)
    both = spread(torch.cat([by_group(dot, G), of_square[:, :, None]], dim=2), tokens)
    if valid is not None:
        both = both * valid[:, None, None].to(both.dtype)
    return GateGradients(both[:, :, :-1], both[:, :, -1], of_norm, e.sum((1, 3)))


def head_gradient(dgate: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """dL (M, H) of g = σ(L), which is 0 where the modality is missing; ``cu_seqlens`` where sequences are packed."""
    if cu_seqlens is None:
        slopes = dgate.sum(-1)
    else:
        bounds = cu_seqlens.long()
        sums = torch.nn.functional.pad(dgate[:, 0].double().cumsum(-1), (1, 0))
        slopes = (sums[..., bounds[1:]] - sums[..., bounds[:-1]]).float().transpose(1, 2)
    return (slopes * (value * (1 - value))[..., 0]).sum(1)


def spread(x: Tensor, tokens: int) -> Tensor:
    """The gradient of sums (..., T') as that of their ``tokens`` terms: each term is in its own sum and all later ones."""
    if x.shape[-1] > 1:
        x = x.flip(-1).cumsum(-1).flip(-1)
    before = tokens - x.shape[-1]
    return torch.cat([x[..., :1].expand(*x.shape[:-1], before), x], dim=-1) if before else x


# What is hidden


def without_missing(present: Tensor | None, *maps: Tensor | None) -> list[Tensor | None]:
    """The maps (M, B, H, d) with 0 where ``present`` (M, B) bool is False, and so are their gradients."""
    if present is None:
        return list(maps)
    missing = ~present[:, :, None, None]
    return [x if x is None else x.masked_fill(missing, 0) for x in maps]


def without_hidden(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, ·, T, d) with 0 for what is not a number, infinite or immense in rows that padding hides.

    valid (B, Tk) bool: the rows are the last T of them.
    """
    if valid is None:
        return x
    hidden = ~valid[:, None, valid.shape[1] - x.shape[2] :, None]
    return x.masked_fill(hidden & ~(x.abs() < ORDINARY), 0)


def finite(*tensors: Tensor | None) -> bool:
    """Whether all sums are finite, which they are not where an entry is not: one read and no copy."""
    found = (x for x in tensors if x is not None)
    return all(math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))) for x in found)


class _Shield(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(valid)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return without_hidden(grad, *ctx.saved_tensors), None


def shield(output: Tensor, valid: Tensor | None) -> Tensor:
    """``output`` (B, H, Tq, d) itself, whose gradient arrives ``without_hidden``."""
    return output if valid is None or not output.requires_grad else _Shield.apply(output, valid)
