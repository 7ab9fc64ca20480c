"""The arithmetic around attention: what the gates and the modalities' vectors make of queries and results.

Shapes: B batch, H query heads, T tokens, d head width, M modalities; T' is T or, where one gate serves all queries, 1.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.call import Setting
from mitrain_kernels.infused_attention.workspace import workspace

PIECE = 1 << 20
"""Elements that are worked on at a time outside of attention: four megabytes in float32."""


class Maps(NamedTuple):
    """k_mul, v_mul, v_add (M, B, H, d) and head_logit (M, H), in the precision of the computation."""

    k_mul: Tensor
    v_mul: Tensor
    v_add: Tensor
    head_logit: Tensor


def cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in one type. Asking first is a microsecond faster than a conversion that changes nothing."""
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]


def weighted(gate: Tensor, vectors: Tensor, out: Tensor | None = None) -> Tensor | None:
    """Σ_m g_m x_m (B, H, T', d) of gate (M, B, H, T') and vectors (M, B, H, d); None without modalities."""
    total = None
    for m in range(len(gate)):
        g, x = gate[m, ..., None], vectors[m, ..., None, :]
        total = torch.mul(g, x, out=out) if total is None else total.addcmul_(g, x)
    return total


def scaled(x: Tensor, factor: Tensor | None, base: Tensor | float, out: Tensor | None = None) -> Tensor:
    """x ⊙ (base + factor); x (B, H, T, d), factor as ``weighted`` gives it."""
    if isinstance(base, float) and base == 1:
        return x if factor is None else torch.addcmul(x, x, factor, out=out)
    rows = base[:, None, None, None] if isinstance(base, Tensor) else base
    return torch.mul(x, rows if factor is None else factor + rows, out=out)


def pieces(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and heads of x (B, H, T, d), some at a time, so that what is made on the way stays in a cache."""
    B, H, T, d = x.shape
    room = max(1, PIECE // max(1, T * d))
    samples, heads = (room // H, H) if room >= H else (1, room)
    for b in range(0, B, samples):
        for h in range(0, H, heads):
            yield slice(b, min(b + samples, B)), slice(h, min(h + heads, H))


def base_of(base: Tensor | float, samples: slice) -> Tensor | float:
    return base[samples] if isinstance(base, Tensor) else base


def infuse_query(q: Tensor, gate: Tensor, maps: Maps, base: Tensor | float) -> Tensor:
    """q ⊙ α = q ⊙ (base + Σ_m g_m k_mul_m), q itself or scratch."""
    if not len(gate) and isinstance(base, float) and base == 1:
        return q
    if gate.shape[-1] != q.shape[2]:
        return scaled(q, weighted(gate, maps.k_mul), base)
    out = workspace.take("inner", q.dtype, q.shape)
    for where in pieces(q):
        own = out[where]
        factor = weighted(gate[:, *where], maps.k_mul[:, *where], out=own)
        scaled(q[where], factor, base_of(base, where[0]), out=own)
    return out


def visible(gate: Tensor, setting: Setting) -> Tensor:
    """The gate (M, B, H, T'), 0 for queries that see no key."""
    return gate if setting.sees is None else gate * setting.sees


def infuse_output(attended: Tensor, gate: Tensor, maps: Maps, base: Tensor | float) -> Tensor:
    """A ⊙ γ + δ = base A + Σ_m g_m (A ⊙ v_mul_m + v_add_m), a new tensor."""
    output, plain = torch.empty_like(attended), isinstance(base, float) and base == 1
    for where in pieces(attended):
        own, out = attended[where], output[where]
        total = own if plain else scaled(own, None, base_of(base, where[0]))
        for m in range(len(gate)):
            at = (m, *where)
            scratch = out if total is own else torch.empty_like(out)
            infused = torch.addcmul(maps.v_add[at].unsqueeze(-2), own, maps.v_mul[at].unsqueeze(-2), out=scratch)
            total = torch.addcmul(total, infused, gate[at].unsqueeze(-1), out=out)
        if total is not out:
            out.copy_(total)
    return output
