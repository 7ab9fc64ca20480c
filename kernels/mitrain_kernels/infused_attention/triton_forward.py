"""The forward kernels: flash attention with the infusion on chip; first, what the backward kernels share with them.

For gates that do not depend on the key, the query tile is scaled once (prologue) and the output once (epilogue); keys
and values are read as they are. Under the gate 'token' each tile of keys and values is infused as it arrives.

Decoding: one query per head against a long cache, the keys split over programs (split-K), then merged. The query heads
that share a key/value head are the rows of one tile, so that each key is read once.

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
    """Rows ``start + rows`` where ``keep`` (None: all), else 0; base points at the head, addresses beyond 2³¹ are safe."""
    columns = tl.arange(0, BD)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if D < BD:
        inside = (columns < D)[None, :]
        tile = tl.load(pointers, mask=inside if keep is None else keep[:, None] & inside, other=0.0)
    elif keep is None:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=keep[:, None], other=0.0)
    return tile


@triton.jit
def without_hidden(tile, VALID, position, keep):
    """The tile (rows, BD) with 0 for what is not a number, infinite or immense (gate.py) in rows that VALID hides.

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
def factor(GATE, stride_m, stride_t, rows, keep, MAP, map_m, base, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """base + Σ_m g_m map_m for each row, (rows, BD) in float32; GATE at the first row, MAP at the sample's head."""
    total = tl.zeros((rows.shape[0], BD), dtype=tl.float32) + base
    for m in tl.static_range(M):
        gate = tl.load(GATE + m * stride_m + rows * stride_t, mask=keep, other=0.0)
        total += gate[:, None] * load_vector(MAP + m * map_m, D, BD)[None, :]
    return total


@triton.jit
def infused_pair(
    k, v, GATE, stride_m, stride_t, rows, keep, KM, VM, KA, VA, map_m, base,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Tiles of keys and values under the gate 'token', in their own type; arguments as of ``factor``."""
    k32 = k.to(tl.float32) * factor(GATE, stride_m, stride_t, rows, keep, KM, map_m, base, M, D, BD)
    if KA is not None:
        k32 += factor(GATE, stride_m, stride_t, rows, keep, KA, map_m, 0.0, M, D, BD)
    v32 = v.to(tl.float32) * factor(GATE, stride_m, stride_t, rows, keep, VM, map_m, base, M, D, BD)
    v32 += factor(GATE, stride_m, stride_t, rows, keep, VA, map_m, 0.0, M, D, BD)
    return k32.to(k.dtype), v32.to(v.dtype)


@triton.jit
def softmax_step(scores, unit, v, acc, top, total):
    """One tile of the online softmax: scores and top times ``unit`` > 0 are in units of log2, -inf where hidden.

    The unit comes last, so that a score costs one fused multiply-add and one exp2.
    """
    highest = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest) * unit
    weights = tl.exp2(scores * unit - safe[:, None])
    shrink = tl.exp2(top * unit - safe)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, highest, total


@triton.jit
def seen_by(position, key, keep, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys are visible from which query positions, of those ``keep``; all broadcast against each other."""
    seen = keep
    if CAUSAL:
        seen = seen & (key <= position)
    if WINDOW:
        seen = seen & (position - key < window)
        if not CAUSAL:
            seen = seen & (key - position < window)
    return seen


@triton.jit
def key_range(first, last, keys, window, VALID, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """low, middle, high: keys that any query position from first to last may see, from a multiple of BN up to an end.

    Those below ``middle`` are whole tiles that every position sees.
    """
    low = first * 0
    high = keys
    middle = low
    if (VALID is None) and (not WINDOW):
        middle = keys // BN * BN
        if CAUSAL:
            middle = tl.minimum(first + 1, keys) // BN * BN
    if CAUSAL:
        high = tl.minimum(keys, last + 1)
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // BN * BN
        if not CAUSAL:
            high = tl.minimum(keys, last + window)
        middle = low
    return low, middle, high


@triton.jit
def query_range(first, last, queries, past, window, BM: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """low, middle, end, high: queries that may see any key from first to last; query i stands at position i + past.

    Those from ``middle`` to ``end`` are whole tiles that see all these keys.
    """
    low = first * 0
    high = queries
    middle = low
    if CAUSAL:
        low = tl.maximum(first - past, 0) // BM * BM
        middle = tl.cdiv(tl.minimum(tl.maximum(last - past, 0), high), BM) * BM
    end = tl.maximum(middle, high // BM * BM)
    if WINDOW:
        high = tl.maximum(tl.minimum(queries, last + window - past), 0)
        if not CAUSAL:
            low = tl.maximum(first - window + 1 - past, 0) // BM * BM
        middle = low
        end = low
    return low, middle, end, high


@triton.jit
def unit_of(scale, SOFTCAP: tl.constexpr):
    """What makes scores as they leave ``bend`` units of log2."""
    if SOFTCAP:
        scale = 1.0
    return scale * LOG2E


@triton.jit
def bend(scores, scale, softcap, SOFTCAP: tl.constexpr):
    """softcap · tanh(scale scores / softcap) where there is a softcap, else the scores as they are."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (scale * (2.0 * LOG2E) / softcap)) + 1.0))
    return scores


@triton.jit
def unbend(gradient, bent, softcap, SOFTCAP: tl.constexpr):
    """The gradient before ``bend`` from that of its result."""
    if SOFTCAP:
        ratio = bent / softcap
        gradient *= 1.0 - ratio * ratio
    return gradient


@triton.jit
def attend_keys(
    q, K, V, low, high, stride_k, stride_v, position, VALID, keys, window, softcap, scale, base,
    GATE, gate_m, gate_t, KM, VM, KA, VA, map_m, acc, top, total,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys low … high; acc (BM, BD), top and total (BM,), as ``softmax_step`` has them."""
    columns = tl.arange(0, BN)
    unit = unit_of(scale, SOFTCAP)
    for start in range(low, high, BN):
        key = start + columns
        keep = key < keys
        if VALID is not None:
            keep = keep & (tl.load(VALID + key, mask=keep, other=0) != 0)
        loaded = keep if MASKED else None
        k = load_tile(K, start, stride_k, columns, loaded, D, BD)
        v = load_tile(V, start, stride_v, columns, loaded, D, BD)
        if TOKEN:
            gates = GATE + start * gate_t
            k, v = infused_pair(
                k, v, gates, gate_m, gate_t, columns, keep, KM, VM, KA, VA, map_m, base, M, D, BD
            )  # fmt: skip
        scores = bend(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        if MASKED:
            seen = seen_by(position[:, None], key[None, :], keep[None, :], window, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        acc, top, total = softmax_step(scores, unit, v, acc, top, total)
    return acc, top, total


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def forward_kernel(
    Q, K, V, OUT, ATTENDED, LSE, GATE, KM, VM, VA, KA, BASE, VALID, BOUNDS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, lse_b, lse_h, gate_m, gate_b, gate_h, gate_t, valid_b,
    batch, heads, group, queries, keys, window, softcap, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries, heads, samples), the blocks with the most keys first.

    GATE (M, B, H, Tq), or (M, B, H, Tk) under the gate 'token'; maps (M, B, H, D) contiguous. ATTENDED and LSE (base
    2, +inf where a query sees nothing) are for the backward pass: None leaves them out.
    """
    head, sample = tl.program_id(1), tl.program_id(2)
    first, queries, keys = sample_span(BOUNDS, sample, queries, keys)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if start >= queries:
        return
    wide, past = sample.to(tl.int64), keys - queries
    rows = tl.arange(0, BM)
    keep = start + rows < queries
    position = start + rows + past
    Q += wide * q_b + head * q_h + first * q_t
    K += wide * k_b + head // group * k_h + first * k_t
    V += wide * v_b + head // group * v_h + first * v_t
    out = wide * o_b + head * o_h + first * o_t
    GATE += wide * gate_b + head * gate_h + first * gate_t
    place = (wide * heads + head) * D
    map_m = tl.cast(batch, tl.int64) * heads * D
    KM, VM, VA = KM + place, VM + place, VA + place
    if KA is not None:
        KA += place
    if VALID is not None:
        VALID += wide * valid_b
    base = tl.load(BASE + sample)
    gates = GATE + start.to(tl.int64) * gate_t
    q = without_hidden(load_tile(Q, start, q_t, rows, keep, D, BD), VALID, position, keep)
    if not TOKEN:
        q = (q.to(tl.float32) * factor(gates, gate_m, gate_t, rows, keep, KM, map_m, base, M, D, BD)).to(q.dtype)
    low, middle, high = key_range(start + past, start + past + BM - 1, keys, window, VALID, BN, CAUSAL, WINDOW)
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    for masked in tl.static_range(2):
        acc, top, total = attend_keys(
            q, K, V, middle if masked else low, high if masked else middle, k_t, v_t, position, VALID, keys, window,
            softcap, scale, base, GATE, gate_m, gate_t, KM, VM, KA, VA, map_m, acc, top, total,
            M, D, BD, BN, masked, CAUSAL, WINDOW, SOFTCAP, TOKEN,
        )  # fmt: skip
    sees = total > 0.0
    attended = acc / tl.where(sees, total, 1.0)[:, None]
    if LSE is not None:
        lse = tl.where(sees, top * unit_of(scale, SOFTCAP) + tl.log2(tl.where(sees, total, 1.0)), float("inf"))
        tl.store(LSE + wide * lse_b + head * lse_h + first + start + rows, lse, mask=keep)
        store_tile(ATTENDED + out, start, o_t, rows, keep, attended, D, BD)
    if not TOKEN:
        shown = keep & sees
        attended *= factor(gates, gate_m, gate_t, rows, shown, VM, map_m, base, M, D, BD)
        attended += factor(gates, gate_m, gate_t, rows, shown, VA, map_m, 0.0, M, D, BD)
    store_tile(OUT + out, start, o_t, rows, keep, attended, D, BD)


@triton.jit(do_not_specialize=["keys", "window", "share"])
def split_kernel(
    Q, K, V, PARTS, TOPS, TOTALS, GATE, KM, BASE, VALID,
    q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t, gate_m, gate_b, gate_h, valid_b,
    batch, heads, group, keys, window, softcap, scale, share,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid: (splits, key/value heads, samples); each takes ``share`` keys.

    PARTS (splits, B, H, D), TOPS and TOTALS (splits, B, H): softmax sums over the share, relative to its own maximum,
    which TOPS has in units of log2.
    """
    split, shared, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide = sample.to(tl.int64)
    member = tl.arange(0, BM)
    keep = member < group
    first = shared * group
    Q += wide * q_b + first * q_h
    K += wide * k_b + shared * k_h
    V += wide * v_b + shared * v_h
    if VALID is not None:
        VALID += wide * valid_b
    q = load_tile(Q, first * 0, q_h, member, keep, D, BD)
    alpha = tl.zeros((BM, BD), dtype=tl.float32) + tl.load(BASE + sample)
    for m in tl.static_range(M):
        gate = tl.load(GATE + m * gate_m + wide * gate_b + (first + member) * gate_h, mask=keep, other=0.0)
        rows = KM + ((m * tl.cast(batch, tl.int64) + wide) * heads + first) * D
        alpha += gate[:, None] * load_tile(rows, first * 0, D, member, keep, D, BD).to(tl.float32)
    q = (q.to(tl.float32) * alpha).to(q.dtype)
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    columns = tl.arange(0, BN)
    unit = unit_of(scale, SOFTCAP)
    low = split * share
    high = tl.minimum(keys, low + share)
    if WINDOW:
        low = tl.maximum(low, (keys - window) // BN * BN)
    for start in range(low, high, BN):
        key = start + columns
        there = key < high
        if VALID is not None:
            there = there & (tl.load(VALID + key, mask=there, other=0) != 0)
        k = load_tile(K, start, k_t, columns, there, D, BD)
        v = load_tile(V, start, v_t, columns, there, D, BD)
        scores = bend(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        seen = seen_by(keys - 1, key[None, :], there[None, :], window, True, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        acc, top, total = softmax_step(scores, unit, v, acc, top, total)
    row = (split.to(tl.int64) * batch + wide) * heads + first
    store_tile(PARTS + row * D, first * 0, D, member, keep, acc, D, BD)
    tl.store(TOPS + row + member, top * unit, mask=keep)
    tl.store(TOTALS + row + member, total, mask=keep)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    PARTS, TOPS, TOTALS, OUT, GATE, VM, VA, BASE, o_b, o_h, gate_m, gate_b, gate_h, batch, heads, splits,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out = A ⊙ γ + δ of the splits' sums. Grid: (heads, samples); BS >= splits."""
    head, sample = tl.program_id(0), tl.program_id(1)
    wide = sample.to(tl.int64)
    split, columns = tl.arange(0, BS), tl.arange(0, BD)
    keep = split < splits
    rows = (split.to(tl.int64) * batch + wide) * heads + head
    tops = tl.load(TOPS + rows, mask=keep, other=float("-inf"))
    highest = tl.max(tops, 0)
    weights = tl.exp2(tops - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights * tl.load(TOTALS + rows, mask=keep, other=0.0), 0)
    inside = keep[:, None] & (columns < D)[None, :]
    parts = tl.load(PARTS + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
    attended = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    gamma = tl.zeros((BD,), dtype=tl.float32) + tl.load(BASE + sample)
    delta = tl.zeros((BD,), dtype=tl.float32)
    place = (wide * heads + head) * D
    for m in tl.static_range(M):
        gate = tl.load(GATE + m * gate_m + wide * gate_b + head * gate_h)
        at = m * tl.cast(batch, tl.int64) * heads * D + place
        gamma += gate * load_vector(VM + at, D, BD)
        delta += gate * load_vector(VA + at, D, BD)
    out = tl.where(total > 0.0, attended * gamma + delta, 0.0)
    tl.store(OUT + wide * o_b + head * o_h + columns, out.to(OUT.dtype.element_ty), mask=columns < D)
