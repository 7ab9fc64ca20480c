"""The backward pass of infused attention on a CPU, tile by tile: what surrounds attention is done while it is cached.

The mathematics is in ``sdpa.py``. Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys),
T' 1 or Tq gates, d head width, M modalities; in a part b samples, h query heads; in a tile w queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.affine import Maps, scaled, weighted
from mitrain_kernels.infused_attention.call import Setting
from mitrain_kernels.infused_attention.tiles import KeySide, Part, parts, spans, tile_width
from mitrain_kernels.infused_attention.workspace import workspace


class Outside:
    """What attention's backward pass meets, and what it leaves: ``dq``, ``dk``, ``dv`` (None where not asked for).

    Also ``dmaps`` (3, B, H, M, d), the gradients of k_mul, v_mul and v_add for given gates, and ``dgate`` (B, H, M, Tq).
    upstream, q, k, v, attended: of any type, each tile is widened to that of the maps. gate (M, B, H, T'), 0 where a
    query sees no key. needs: which of q, k, v are to get a gradient.
    """

    def __init__(
        self, upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, gate: Tensor, maps: Maps,
        setting: Setting, needs: Sequence[bool],
    ):  # fmt: skip
        self.upstream, self.q, self.k, self.v, self.attended = upstream, q, k, v, attended
        self.gate, self.maps, self.setting, exact = gate, maps, setting, maps.v_add.dtype
        self.dq = torch.empty_like(q) if needs[0] else None
        self.dk, self.dv = (torch.empty(k.shape, dtype=exact) if needed else None for needed in needs[1:3])
        self.rows = gate.permute(1, 2, 0, 3)  # (B, H, M, T')
        self.vectors = torch.stack(maps[:3]).permute(0, 2, 3, 1, 4)  # (3, B, H, M, d)
        self.dmaps = self.dgate = None


def attention_backward(outside: Outside) -> Outside:
    """Fill in what ``outside`` is to leave."""
    q, k, setting = outside.q, outside.k, outside.setting
    width = tile_width(q, k)
    for part in parts(q, k, width):
        infused = InfusedPart(outside, part)
        for queries, keys in spans(q.shape[2], k.shape[2], width, setting):
            infused.tile(queries, keys)
        infused.finish()
    return outside


class InfusedPart:
    """Some samples and heads: what is the same for all of their tiles, and the sums over the tiles."""

    def __init__(self, outside: Outside, part: Part):
        self.outside, self.part, self.setting = outside, part, outside.setting
        self.exact = exact = outside.vectors.dtype
        where = part.samples, part.heads
        self.q, self.upstream, self.attended = (x[where] for x in (outside.q, outside.upstream, outside.attended))
        self.dq = None if outside.dq is None else outside.dq[where]
        k, v = part.keys_of(outside.k, exact), part.keys_of(outside.v, exact)
        self.side = KeySide(k, v, *(None if x is None else part.keys_of(x, exact) for x in (outside.dk, outside.dv)))
        self.gate, base = outside.gate[:, *where], outside.setting.base
        self.k_mul, self.v_mul = (x[:, *where] for x in outside.maps[:2])
        self.base = base[part.samples] if isinstance(base, Tensor) else base
        vectors, rows = outside.vectors[:, *where], outside.rows[where]
        self.shape = vectors.shape  # (3, b, h, M, d)
        self.vectors = vectors.flatten(0, 2)
        self.rows = rows.expand(3, *rows.shape).flatten(0, 2)
        self.dmaps, self.dgates = None, []

    def tile(self, queries: slice, keys: slice) -> None:
        exact, each = self.exact, self.gate.shape[-1] > 1
        gate = self.gate[..., queries] if each else self.gate
        q = self.q[:, :, queries]
        q, shape = q if q.dtype == exact else q.to(exact), q.shape
        products = workspace.take("products", exact, (3, *shape))
        of_q, of_attended, upstream = products.unbind()
        upstream.copy_(self.upstream[:, :, queries])
        inward, _ = infuse(upstream, gate, self.v_mul, self.base, "upstream")
        if self.setting.sees is not None:
            inward.mul_(self.setting.sees[self.part.samples, :, queries, None])
        inner, factor = infuse(q, gate, self.k_mul, self.base, "inner")
        if self.q.dtype != exact:
            inner.copy_(inner.to(self.q.dtype))  # as the forward pass rounded it
        flat = (len(self.side.k), -1, shape[-1])
        self.side.backward(inner.view(flat), inward.view(flat), self.part.samples, queries, keys, self.setting)
        torch.mul(inner, q, out=of_q)
        torch.mul(upstream, self.attended[:, :, queries], out=of_attended)
        if self.dq is not None:
            out = self.dq[:, :, queries]
            result = scaled(inner, factor, self.base, out=out if out.dtype == exact else inner)
            if result is not out:
                out.copy_(result)
        if len(gate):
            self.reduce(products.flatten(0, 2), self.rows[..., queries] if each else self.rows)

    def reduce(self, products: Tensor, rows: Tensor) -> None:
        """From dq' ⊙ q, dO ⊙ A and dO of a tile, (3 b h, w, d), to its shares; rows (3 b h, M, w or 1) are the gates."""
        rows = rows.expand(*rows.shape[:2], products.shape[1])
        if self.dmaps is None:
            self.dmaps = torch.bmm(rows, products)
        else:
            torch.baddbmm(self.dmaps, rows, products, out=self.dmaps)
        self.dgates.insert(0, torch.bmm(self.vectors, products.mT))

    def finish(self) -> None:
        outside, where = self.outside, (self.part.samples, self.part.heads)
        if not self.dgates:
            self.dmaps, self.dgates = self.vectors, [self.vectors.new_empty(len(self.vectors), 0, self.q.shape[2])]
        dmaps = self.dmaps.view(self.shape)
        dgate = torch.cat(self.dgates, dim=-1).view(*self.shape[:-1], self.q.shape[2]).sum(0)
        if self.q.shape[:2] == outside.q.shape[:2]:
            outside.dmaps, outside.dgate = dmaps, dgate
            return
        if outside.dmaps is None:
            outside.dmaps = dmaps.new_empty(outside.vectors.shape)
            outside.dgate = dmaps.new_empty(*outside.rows.shape[:3], self.q.shape[2])
        outside.dmaps[:, *where] = dmaps
        outside.dgate[where] = dgate


def infuse(x: Tensor, gate: Tensor, vectors: Tensor, base: Tensor | float, slot: str) -> tuple[Tensor, Tensor | None]:
    """x ⊙ (base + Σ_m g_m x_m) in scratch of its own, (b, h, w, d), and the sum (b, h, w or 1, d)."""
    out = workspace.take(slot, x.dtype, x.shape)
    each = gate.shape[-1] == x.shape[2]
    factor = weighted(gate, vectors, out=workspace.take(slot + " factor", x.dtype, x.shape) if each else None)
    result = scaled(x, factor, base, out=out)
    return (result if result is out else out.copy_(result)), factor
