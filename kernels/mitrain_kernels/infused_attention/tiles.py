"""The backward pass of softmax attention on a CPU, in tiles of batched matrix products.

A tile is some queries of some samples and key/value heads against all keys that these queries may see. Its weights are
computed again, stay in the cache and are never kept. torch's own CPU operator multiplies one head's 32 to 256 queries at
a time; here the query heads that share a key/value head stand below each other in one product.

    P = softmax(scale q Kᵀ)    dS = P ⊙ (dA Vᵀ − rowsum(P ⊙ dA Vᵀ))    dq = scale dS K    dK = scale dSᵀ q    dV = Pᵀ dA

Shapes: B batch, H query heads, G key/value heads, R = H / G, T tokens (Tq queries, Tk keys), d head width. Within a
tile: N pairs of sample and key/value head, w queries, e keys.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.call import Setting
from mitrain_kernels.infused_attention.workspace import workspace

ROWS = 192
"""Rows R · w of a tile's products, at most: with fewer they are slower, with more there are more masked weights."""
TILE_BYTES = 1 << 24
"""Of a tile's weights, at most, where three such tensors are in use: about the last cache, and enough for all cores."""


class Part(NamedTuple):
    """The samples and heads of a tile."""

    samples: slice
    groups: slice
    heads: slice

    def keys_of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, Tk, d) of x (B, G, Tk, d), in its memory where that is possible."""
        part = x[self.samples, self.groups].flatten(0, 1)
        return part if part.dtype == dtype else part.to(dtype)


def parts(q: Tensor, k: Tensor, width: int) -> Iterator[Part]:
    """All samples and heads of q (B, H, Tq, d) and k (B, G, Tk, d), as many at a time as a tile has room for."""
    (B, H, _, _), (G, Tk) = q.shape, k.shape[1:3]
    R = H // G
    exact = torch.promote_types(k.dtype, torch.float32).itemsize
    room = max(1, TILE_BYTES // (R * width * Tk * exact))
    samples, groups = (room // G, G) if room >= G else (1, room)
    for b in range(0, B, samples):
        for g in range(0, G, groups):
            end = min(g + groups, G)
            yield Part(slice(b, min(b + samples, B)), slice(g, end), slice(g * R, end * R))


def tile_width(q: Tensor, k: Tensor) -> int:
    """w: the largest power of two that gives at most ROWS rows; fewer where there are fewer queries."""
    most = max(1, ROWS * k.shape[1] // q.shape[1])
    return min(q.shape[2], 1 << (most.bit_length() - 1))


def spans(queries: int, keys: int, width: int, setting: Setting) -> Iterator[tuple[slice, slice]]:
    """A tile's queries and the keys that any of them may see by order and window, from the last queries to the first."""
    ahead, window = keys - queries, setting.window
    for low in reversed(range(0, queries, width)):
        high = min(low + width, queries)
        start, stop = 0, ahead + high if setting.causal else keys
        if window is not None:
            start, stop = max(0, ahead + low - window + 1), min(stop, ahead + high + window - 1)
        yield slice(low, high), slice(start, stop)


@lru_cache(maxsize=8)
def later(width: int, dtype: torch.dtype) -> Tensor:
    """(w, w): the lowest number where a key comes after the query, else 0."""
    return torch.full((width, width), lowest(dtype), dtype=dtype).triu(1)


def lowest(dtype: torch.dtype) -> float:
    """What hides a score: finite, so that a row without any visible key has weights, which its zero gradient meets."""
    return torch.finfo(dtype).min / 2


def hide(scores: Tensor, samples: slice, queries: slice, keys: slice, setting: Setting) -> None:
    """Lower the scores (N, R w, e) of the keys that a query does not see, in place."""
    mask, width = setting.mask, queries.stop - queries.start
    if mask is not None:
        own = mask[samples if len(mask) > 1 else slice(None), :, queries, keys]
        scores = scores.view(samples.stop - samples.start, -1, width, scores.shape[-1])
        if mask.dtype == torch.bool:
            scores.masked_fill_(~own, lowest(scores.dtype))
        else:
            scores.add_(own).clamp_min_(lowest(scores.dtype))
    elif setting.causal and width > 1:
        scores.view(-1, width, scores.shape[-1])[..., -width:].add_(later(width, scores.dtype))


class KeySide:
    """Keys and values of a part, (N, Tk, d) each, and where their gradients add up (None: not asked for)."""

    def __init__(self, k: Tensor, v: Tensor, dk: Tensor | None, dv: Tensor | None):
        self.k, self.v, self.dk, self.dv = k, v, dk, dv
        self.fresh = True

    def add(self, total: Tensor | None, weights: Tensor, x: Tensor, keys: slice, scale: float) -> None:
        """total[keys] += scale weightsᵀ x, for weights (N, R w, e) and x (N, R w, d)."""
        if total is None:
            return
        N, Tk, d = total.shape
        if self.fresh and keys == slice(0, Tk):
            torch.baddbmm(total, weights.mT, x, beta=0, alpha=scale, out=total)
            return
        if self.fresh:
            total.zero_()
        part = workspace.take("keys", total.dtype, (N, keys.stop - keys.start, d))
        total[:, keys].add_(torch.bmm(weights.mT, x, out=part), alpha=scale)

    def backward(
        self, q: Tensor, upstream: Tensor, samples: slice, queries: slice, keys: slice, setting: Setting
    ) -> Tensor:
        """dq of a tile, in the memory of q; q and upstream are (N, R w, d) and contiguous."""
        k, v = self.k[:, keys], self.v[:, keys]
        shape = (*q.shape[:2], keys.stop - keys.start)
        scores, weights, dweights = (workspace.take(x, q.dtype, shape) for x in ("scores", "weights", "dweights"))
        torch.baddbmm(scores, q, k.mT, beta=0, alpha=setting.scale, out=scores)
        hide(scores, samples, queries, keys, setting)
        torch.softmax(scores, -1, out=weights)
        self.add(self.dv, weights, upstream, keys, 1.0)
        torch.bmm(upstream, v.mT, out=dweights)
        dscores = torch.ops.aten._softmax_backward_data.out(dweights, weights, -1, q.dtype, grad_input=scores)
        self.add(self.dk, dscores, q, keys, setting.scale)
        self.fresh = False
        return torch.baddbmm(q, dscores, k, beta=0, alpha=setting.scale, out=q)
