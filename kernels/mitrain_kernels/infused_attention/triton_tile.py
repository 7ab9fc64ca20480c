"""What the attention kernels share: where a sample lies, what a query sees, and how a tile is infused.

Shapes: a tile has rows (queries or keys) × BD columns, of which the first D are the head's width.
"""

import triton
import triton.language as tl

ORDINARY = tl.constexpr(2.0**50)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sample_span(BOUNDS, sample, queries, keys):
    """First token of a sample among the packed ones, its number of queries and of keys; BOUNDS None: not packed."""
    if BOUNDS is None:
        first = sample.to(tl.int64) * 0
    else:
        first = tl.load(BOUNDS + sample).to(tl.int64)
        queries = (tl.load(BOUNDS + sample + 1).to(tl.int64) - first).to(tl.int32)
        keys = queries
    return first, queries, keys


@triton.jit
def load_tile(base, start, stride, rows, keep, D: tl.constexpr, BD: tl.constexpr):
    """Rows ``start + rows`` where ``keep``, else 0; base points at the head, addresses beyond 2³¹ are safe."""
    columns = tl.arange(0, BD)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if D == BD:
        tile = tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=keep[:, None] & (columns < D)[None, :], other=0.0)
    return tile


@triton.jit
def without_hidden(tile, VALID, position, keep):
    """The tile (rows, BD) with 0 for what is not a number, infinite or immense (hidden.py) in rows that VALID hides.

    VALID at the sample's first key, or None; position: the rows' keys."""
    if VALID is not None:
        shown = tl.load(VALID + position, mask=keep, other=1) != 0
        tile = tl.where(shown[:, None] | (tl.abs(tile.to(tl.float32)) < ORDINARY), tile, tl.zeros_like(tile))
    return tile


@triton.jit
def store_tile(base, start, stride, rows, keep, x, D: tl.constexpr, BD: tl.constexpr):
    columns = tl.arange(0, BD)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if D == BD:
        tl.store(pointers, x.to(base.dtype.element_ty), mask=keep[:, None])
    else:
        tl.store(pointers, x.to(base.dtype.element_ty), mask=keep[:, None] & (columns < D)[None, :])


@triton.jit
def load_vector(base, D: tl.constexpr, BD: tl.constexpr):
    """A map's row (BD,) in float32."""
    columns = tl.arange(0, BD)
    return tl.load(base + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_vector(base, x, D: tl.constexpr, BD: tl.constexpr):
    """The first D of x (BD,)."""
    columns = tl.arange(0, BD)
    tl.store(base + columns, x, mask=columns < D)


@triton.jit
def factor(GATE, stride_m, stride_t, rows, keep, MUL, map_m, base, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """base + Σ_m g_m mul_m for each row, (rows, BD) in float32; GATE at the first row, MUL at the sample's head."""
    total = tl.zeros((rows.shape[0], BD), dtype=tl.float32) + base
    for m in tl.static_range(M):
        gate = tl.load(GATE + m * stride_m + rows * stride_t, mask=keep, other=0.0)
        total += gate[:, None] * load_vector(MUL + m * map_m, D, BD)[None, :]
    return total


@triton.jit
def shift(GATE, stride_m, stride_t, rows, keep, ADD, map_m, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Σ_m g_m add_m for each row, (rows, BD) in float32."""
    total = tl.zeros((rows.shape[0], BD), dtype=tl.float32)
    for m in tl.static_range(M):
        gate = tl.load(GATE + m * stride_m + rows * stride_t, mask=keep, other=0.0)
        total += gate[:, None] * load_vector(ADD + m * map_m, D, BD)[None, :]
    return total


@triton.jit
def infused_pair(
    k, v, GATE, stride_m, stride_t, rows, keep, KM, VM, KA, VA, map_m, base,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Tiles of keys and values under the gate 'token', in their own type; arguments as of ``factor``."""
    k32 = k.to(tl.float32) * factor(GATE, stride_m, stride_t, rows, keep, KM, map_m, base, M, D, BD)
    if KA is not None:
        k32 += shift(GATE, stride_m, stride_t, rows, keep, KA, map_m, M, D, BD)
    v32 = v.to(tl.float32) * factor(GATE, stride_m, stride_t, rows, keep, VM, map_m, base, M, D, BD)
    v32 += shift(GATE, stride_m, stride_t, rows, keep, VA, map_m, M, D, BD)
    return k32.to(k.dtype), v32.to(v.dtype)


@triton.jit
def softmax_step(scores, v, acc, top, total):
    """One tile of the online softmax: scores in units of log2, -inf where hidden."""
    highest = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, highest, total


@triton.jit
def seen_by(position, key, keep, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys are visible from which query positions; position and key broadcast against each other."""
    seen = keep
    if CAUSAL:
        seen = seen & (key <= position)
    if WINDOW:
        seen = seen & (position - key < window)
        if not CAUSAL:
            seen = seen & (key - position < window)
    return seen


@triton.jit
def key_range(first, last, keys, window, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that any query position from first to last may see: from a multiple of BN up to an end."""
    low = first * 0
    high = keys
    if CAUSAL:
        high = tl.minimum(keys, last + 1)
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // BN * BN
        if not CAUSAL:
            high = tl.minimum(keys, last + window)
    return low, high


@triton.jit
def query_range(first, last, queries, past, window, BM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Queries that may see any key from first to last; query i stands at position i + past."""
    low = first * 0
    high = queries
    if CAUSAL:
        low = tl.maximum(first - past, 0) // BM * BM
    if WINDOW:
        high = tl.maximum(tl.minimum(queries, last + window - past), 0)
        if not CAUSAL:
            low = tl.maximum(first - window + 1 - past, 0) // BM * BM
    return low, high


@triton.jit
def bend(scores, softcap, SOFTCAP: tl.constexpr):
    """softcap · tanh(scores / softcap) where there is a softcap."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
    return scores


@triton.jit
def unbend(gradient, bent, softcap, SOFTCAP: tl.constexpr):
    """The gradient before ``bend`` from that of its result."""
    if SOFTCAP:
        ratio = bent / softcap
        gradient *= 1.0 - ratio * ratio
    return gradient
