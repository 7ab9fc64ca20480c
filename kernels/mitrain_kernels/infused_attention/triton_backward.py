"""The backward kernels, deterministic and without atomics.

``query_kernel`` owns a block of queries: dq, the gate's gradient from the scale of q and the affine map of the output,
and their share of the maps' gradients. It hands q', dA and D to ``key_kernel``, which owns a block of keys: dK and dV,
over the queries of all heads that share them. Under the gate 'token' it has the maps' gradients too, one query head per
program.

where: A the plain attention's output, α, γ, δ as at ``infused_attention_folded``, q' = q ⊙ α, dA = dO ⊙ γ (under 'token'
q and dO), D = Σ dA ⊙ A.
"""

import triton
import triton.language as tl

from mitrain_kernels.infused_attention.triton_forward import (
    bend,
    factor,
    infused_pair,
    key_range,
    load_tile,
    load_vector,
    query_range,
    sample_span,
    seen_by,
    store_tile,
    store_vector,
    unbend,
    unit_of,
    without_hidden,
)


@triton.jit
def value_shares(
    dout, attended, GATE, gate_m, gate_t, rows, shown, keep, VM, VA, map_m, DGATE, out_m, PART, M: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A block's shares of d v_mul and d v_add, behind that of d k_mul at PART, and dgate as far as the output gives it.

    GATE at the block's first query, DGATE (rows,) at its queries.
    """
    product = dout * attended
    for m in tl.static_range(M):
        gate = tl.load(GATE + m * gate_m + rows * gate_t, mask=shown, other=0.0)
        v_mul, v_add = load_vector(VM + m * map_m, D, BD), load_vector(VA + m * map_m, D, BD)
        slopes = tl.sum(product * v_mul[None, :] + dout * v_add[None, :], 1)
        tl.store(DGATE + m * out_m, slopes, mask=keep)
        store_vector(PART + (M + m) * map_m, tl.sum(gate[:, None] * product, 0), D, BD)
        store_vector(PART + (2 * M + m) * map_m, tl.sum(gate[:, None] * dout, 0), D, BD)


@triton.jit
def query_shares(
    raw, GATE, gate_m, gate_t, rows, shown, keep, KM, map_m, DGATE, out_m, PART, M: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """The block's share of d k_mul and what the scale of q adds to dgate; raw: dq' ⊙ q, the rest as ``value_shares``."""
    for m in tl.static_range(M):
        gate = tl.load(GATE + m * gate_m + rows * gate_t, mask=shown, other=0.0)
        slopes = tl.load(DGATE + m * out_m, mask=keep, other=0.0)
        slopes += tl.sum(raw * load_vector(KM + m * map_m, D, BD)[None, :], 1)
        tl.store(DGATE + m * out_m, slopes, mask=keep)
        store_vector(PART + m * map_m, tl.sum(gate[:, None] * raw, 0), D, BD)


@triton.jit
def query_gradient(
    q, inward, lse, delta, K, V, low, high, stride_k, stride_v, position, VALID, keys, window, softcap, scale, base,
    GATE, gate_m, gate_t, KM, VM, KA, VA, map_m, dinner,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """dinner = dq' / scale (BM, BD) of a block of queries q = q', grown by the keys low … high; lse in units of log2."""
    columns = tl.arange(0, BN)
    unit = unit_of(scale, SOFTCAP)
    for start in range(low, high, BN):
        key = start + columns
        there = key < keys
        if VALID is not None:
            there = there & (tl.load(VALID + key, mask=there, other=0) != 0)
        loaded = there if MASKED else None
        k = load_tile(K, start, stride_k, columns, loaded, D, BD)
        v = load_tile(V, start, stride_v, columns, loaded, D, BD)
        if TOKEN:
            gates = GATE + start * gate_t
            k, v = infused_pair(
                k, v, gates, gate_m, gate_t, columns, there, KM, VM, KA, VA, map_m, base, M, D, BD
            )  # fmt: skip
        bent = bend(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        weights = tl.exp2(bent * unit - lse[:, None])
        if MASKED:
            seen = seen_by(position[:, None], key[None, :], there[None, :], window, CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(inward, tl.trans(v), input_precision="ieee")
        dscores = unbend(weights * (dweights - delta[:, None]), bent, softcap, SOFTCAP)
        dinner = tl.dot(dscores.to(k.dtype), k, dinner, input_precision="ieee")
    return dinner


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def query_kernel(
    Q, K, V, ATTENDED, DOUT, LSE, DELTA, INNER, INWARD, DQ, DGATE, PARTS, GATE, KM, VM, VA, KA, BASE, VALID, BOUNDS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, d_b, d_h, d_t, lse_b, lse_h,
    gate_m, gate_b, gate_h, gate_t, out_m, out_b, out_h, valid_b,
    batch, heads, group, queries, keys, window, softcap, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """Grid as forward. DGATE (M, B, H, Tq); PARTS (blocks, 3, M, B, H, D): shares of d k_mul, d v_mul, d v_add for a
    given gate. For the keys' side: DELTA, D of each query, INNER and INWARD, q' and dA (None: k and v need no gradient).
    DQ None: q itself needs no gradient.
    """
    head, sample = tl.program_id(1), tl.program_id(2)
    first, queries, keys = sample_span(BOUNDS, sample, queries, keys)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    start = block * BM
    wide, past = sample.to(tl.int64), keys - queries
    rows = tl.arange(0, BM)
    keep = start + rows < queries
    position = start + rows + past
    Q += wide * q_b + head * q_h + first * q_t
    K += wide * k_b + head // group * k_h + first * k_t
    V += wide * v_b + head // group * v_h + first * v_t
    ATTENDED += wide * o_b + head * o_h + first * o_t
    DOUT += wide * d_b + head * d_h + first * d_t
    scalars = wide * lse_b + head * lse_h + first + start
    GATE += wide * gate_b + head * gate_h + first * gate_t
    place = (wide * heads + head) * D
    map_m = tl.cast(batch, tl.int64) * heads * D
    part = PARTS + block.to(tl.int64) * 3 * M * map_m + place
    KM, VM, VA = KM + place, VM + place, VA + place
    if KA is not None:
        KA += place
    if VALID is not None:
        VALID += wide * valid_b
    base = tl.load(BASE + sample)
    gates = GATE + start.to(tl.int64) * gate_t
    lse = tl.load(LSE + scalars + rows, mask=keep, other=float("inf"))
    shown = keep & (lse != float("inf"))
    dout = load_tile(DOUT, start, d_t, rows, shown, D, BD).to(tl.float32)
    dout = without_hidden(dout, VALID, position, keep)
    attended = load_tile(ATTENDED, start, o_t, rows, shown, D, BD).to(tl.float32)
    dgates = DGATE + wide * out_b + head * out_h + first + start + rows
    inward = dout
    if not TOKEN:
        value_shares(
            dout, attended, gates, gate_m, gate_t, rows, shown, keep, VM, VA, map_m, dgates, out_m, part, M, D, BD
        )  # fmt: skip
        inward = dout * factor(gates, gate_m, gate_t, rows, shown, VM, map_m, base, M, D, BD)
    delta = tl.sum(inward * attended, 1)
    tl.store(DELTA + scalars + rows, delta, mask=keep)
    q = without_hidden(load_tile(Q, start, q_t, rows, keep, D, BD), VALID, position, keep)
    if not TOKEN:
        q = (q.to(tl.float32) * factor(gates, gate_m, gate_t, rows, shown, KM, map_m, base, M, D, BD)).to(q.dtype)
    inward = inward.to(q.dtype)
    out = wide * o_b + head * o_h + first * o_t
    if INNER is not None:
        store_tile(INNER + out, start, o_t, rows, keep, q, D, BD)
        store_tile(INWARD + out, start, o_t, rows, keep, inward, D, BD)
    low, middle, high = key_range(start + past, start + past + BM - 1, keys, window, VALID, BN, CAUSAL, WINDOW)
    if start >= queries:
        middle, high = low, low
    dinner = tl.zeros((BM, BD), dtype=tl.float32)
    for masked in tl.static_range(2):
        dinner = query_gradient(
            q, inward, lse, delta, K, V, middle if masked else low, high if masked else middle, k_t, v_t, position, VALID,
            keys, window, softcap, scale, base, GATE, gate_m, gate_t, KM, VM, KA, VA, map_m, dinner,
            M, D, BD, BN, masked, CAUSAL, WINDOW, SOFTCAP, TOKEN,
        )  # fmt: skip
    dinner *= scale
    if not TOKEN:
        raw = without_hidden(load_tile(Q, start, q_t, rows, shown, D, BD), VALID, position, keep)
        raw = raw.to(tl.float32) * dinner
        query_shares(raw, gates, gate_m, gate_t, rows, shown, keep, KM, map_m, dgates, out_m, part, M, D, BD)
        dinner *= factor(gates, gate_m, gate_t, rows, shown, KM, map_m, base, M, D, BD)
    if DQ is not None:
        store_tile(DQ + out, start, o_t, rows, keep, dinner, D, BD)


@triton.jit
def key_gradients(
    k, v, dk, dv, INNER, INWARD, LSE, DELTA, low, middle, end, high, stride, past, key, queries, window, softcap, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv (BN, BD) of a block of keys, grown by queries of one head: middle … end, or if MASKED the others.

    OF_K, OF_V: which of the two grow. INNER, INWARD, LSE, DELTA at the head's first query. Where a query is not there, its
    lse of +inf makes all weights 0; rows of keys that are hidden or not there may hold anything.
    """
    rows = tl.arange(0, BM)
    unit = unit_of(scale, SOFTCAP)
    if MASKED:
        stop = middle + tl.maximum(high - end, 0)
    else:
        low, stop = middle, end
    for at in range(low, stop, BM):
        start = at
        if MASKED:
            start = at + tl.where(at < middle, 0, end - middle)
            there = start + rows < queries
            lse = tl.load(LSE + start + rows, mask=there, other=float("inf"))
            delta = tl.load(DELTA + start + rows, mask=there, other=0.0)
        else:
            there = None
            lse, delta = tl.load(LSE + start + rows), tl.load(DELTA + start + rows)
        q = load_tile(INNER, start, stride, rows, there, D, BD)
        inward = load_tile(INWARD, start, stride, rows, there, D, BD)
        bent = bend(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, SOFTCAP)
        weights = tl.exp2(bent * unit - lse[None, :])
        if MASKED and (CAUSAL or WINDOW):
            position = start + rows + past
            seen = seen_by(position[None, :], key[:, None], True, window, CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        if OF_V:
            dv = tl.dot(weights.to(q.dtype), inward, dv, input_precision="ieee")
        if OF_K:
            dweights = tl.dot(v, tl.trans(inward), input_precision="ieee")
            dscores = unbend(weights * (dweights - delta[None, :]), bent, softcap, SOFTCAP)
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def token_gradients(
    dk, dv, k, v, GATE, COSINE, ROOT, gate_m, gate_t, keep, NORM, norm_m, KM, VM, VA, KA, map_m, base, PART, DLOGIT,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Under the gate 'token': dk and dv (BN, BD) of infused keys and values to those of k and v, through the gate too.

    The block's shares of the maps' gradients go to PART. GATE, COSINE, ROOT at the first key; NORM and DLOGIT at the
    head, a modality every ``norm_m``; PART at the head.
    """
    columns = tl.arange(0, k.shape[0])
    through = tl.zeros((k.shape[0], BD), dtype=tl.float32)
    for m in tl.static_range(M):
        gate = tl.load(GATE + m * gate_m + columns * gate_t, mask=keep, other=0.0)
        cosine = tl.load(COSINE + m * gate_m + columns * gate_t, mask=keep, other=0.0)
        root = tl.load(ROOT + m * gate_m + columns * gate_t, mask=keep, other=0.0)
        norm = tl.load(NORM + m * norm_m)
        v_add = load_vector(VA + m * map_m, D, BD)
        dgate = tl.sum(dk * k * load_vector(KM + m * map_m, D, BD)[None, :], 1)
        dgate += tl.sum(dv * (v * load_vector(VM + m * map_m, D, BD)[None, :] + v_add[None, :]), 1)
        if KA is not None:
            dgate += tl.sum(dk * load_vector(KA + m * map_m, D, BD)[None, :], 1)
            store_vector(PART + (3 * M + m) * map_m, tl.sum(gate[:, None] * dk, 0), D, BD)
        e = dgate * gate * (1.0 - gate)
        dot = e * root
        w = dot * cosine * root
        energy = tl.sum(w * tl.sum(v * v, 1), 0)
        through += dot[:, None] * v_add[None, :] - (w * norm)[:, None] * v
        store_vector(PART + m * map_m, tl.sum(gate[:, None] * (dk * k), 0), D, BD)
        store_vector(PART + (M + m) * map_m, tl.sum(gate[:, None] * (dv * v), 0), D, BD)
        dv_add = tl.sum(gate[:, None] * dv + dot[:, None] * v, 0) - energy * v_add
        store_vector(PART + (2 * M + m) * map_m, dv_add, D, BD)
        tl.store(DLOGIT + m * norm_m, tl.sum(e, 0))
    dk *= factor(GATE, gate_m, gate_t, columns, keep, KM, map_m, base, M, D, BD)
    dv = dv * factor(GATE, gate_m, gate_t, columns, keep, VM, map_m, base, M, D, BD) + through
    return dk, dv


@triton.jit
def through_cosine(dv, values, DOT, SQUARE, dot_m, keep, VA, map_m, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """dv and what the gate's cosine of one query head adds: Σ_m DOT_m v_add_m − SQUARE V."""
    dv -= tl.load(SQUARE, mask=keep, other=0.0)[:, None] * values
    for m in tl.static_range(M):
        dot = tl.load(DOT + m * dot_m, mask=keep, other=0.0)
        dv += dot[:, None] * load_vector(VA + m * map_m, D, BD)[None, :]
    return dv


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def key_kernel(
    INNER, K, V, INWARD, LSE, DELTA, DK, DV, SUMS_DOT, SUMS_SQUARE, PARTS, DLOGIT,
    GATE, COSINE, ROOT, NORM, KM, VM, VA, KA, BASE, VALID, BOUNDS,
    o_b, o_h, o_t, k_b, k_h, k_t, v_b, v_h, v_t, dk_b, dk_h, dk_t, lse_b, lse_h,
    gate_m, gate_b, gate_h, gate_t, sum_m, sum_b, sum_h, valid_b,
    batch, heads, group, queries, keys, window, softcap, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys, key/value heads, samples); under 'token' query heads take the place of key/value heads.

    INNER, INWARD, DELTA: as the queries' side left them. SUMS_DOT (M, B, H, Tk), SUMS_SQUARE (B, H, Tk): what the gate's
    cosine sends to the values (None: nothing). Under 'token' DK and DV are per query head, GATE, COSINE, ROOT
    (M, B, H, Tk), NORM (M, B, H) = ‖v_add‖²,
    PARTS (blocks, 4, M, B, H, D) shares of d k_mul, d v_mul, d v_add, d k_add; DLOGIT (blocks, M, B, H).
    """
    block, lane, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, queries, keys = sample_span(BOUNDS, sample, queries, keys)
    start = block * BN
    wide, past = sample.to(tl.int64), keys - queries
    columns = tl.arange(0, BN)
    keep = start + columns < keys
    if VALID is not None:
        VALID += wide * valid_b
        keep = keep & (tl.load(VALID + start + columns, mask=keep, other=0) != 0)
    shared, members = lane, group
    if TOKEN:
        shared, members = lane // group, 1
    K += wide * k_b + shared * k_h + first * k_t
    V += wide * v_b + shared * v_h + first * v_t
    map_m = tl.cast(batch, tl.int64) * heads * D
    base = tl.load(BASE + sample)
    k = load_tile(K, start, k_t, columns, keep, D, BD)
    v = load_tile(V, start, v_t, columns, keep, D, BD)
    if TOKEN:
        place = (wide * heads + lane) * D
        KM, VM, VA = KM + place, VM + place, VA + place
        if KA is not None:
            KA += place
        own = GATE + wide * gate_b + lane * gate_h + first * gate_t + start.to(tl.int64) * gate_t
        k, v = infused_pair(k, v, own, gate_m, gate_t, columns, keep, KM, VM, KA, VA, map_m, base, M, D, BD)
    dk, dv = tl.zeros((BN, BD), dtype=tl.float32), tl.zeros((BN, BD), dtype=tl.float32)
    low, middle, end, high = query_range(start, start + BN - 1, queries, past, window, BM, CAUSAL, WINDOW)
    if start >= keys:
        middle, end, high = low, low, low
    there = start + columns < keys
    target = wide * dk_b + lane * dk_h + first * dk_t
    for side in tl.static_range(2 if APART else 1):  # dv and dk, or dv, then dk, where registers hold one of them only
        for member in range(0, members):
            head = lane * members + member
            at = wide * o_b + head * o_h + first * o_t
            scalars = wide * lse_b + head * lse_h + first
            for masked in tl.static_range(2):
                dk, dv = key_gradients(
                    k, v, dk, dv, INNER + at, INWARD + at, LSE + scalars, DELTA + scalars, low, middle, end, high, o_t,
                    past, start + columns, queries, window, softcap, scale, D, BD, BM, side == 1 or not APART, side == 0,
                    masked, CAUSAL, WINDOW, SOFTCAP,
                )  # fmt: skip
        if side == 0:
            dv = tl.where(keep[:, None], dv, 0.0)
            values = load_tile(V, start, v_t, columns, keep, D, BD).to(tl.float32)
            if not TOKEN:
                if SUMS_DOT is not None:
                    for member in range(0, members):
                        head = lane * members + member
                        at = wide * sum_b + head * sum_h + first + start + columns
                        v_add = VA + (wide * heads + head) * D
                        dv = through_cosine(
                            dv, values, SUMS_DOT + at, SUMS_SQUARE + at, sum_m, keep, v_add, map_m, M, D, BD
                        )  # fmt: skip
                store_tile(DV + target, start, dk_t, columns, there, dv, D, BD)
    dk = tl.where(keep[:, None], dk * scale, 0.0)
    if TOKEN:
        raw = load_tile(K, start, k_t, columns, keep, D, BD).to(tl.float32)
        gates = wide * gate_b + lane * gate_h + (first + start) * gate_t
        part = PARTS + block.to(tl.int64) * 4 * M * map_m + (wide * heads + lane) * D
        logits = DLOGIT + (block.to(tl.int64) * M * batch + wide) * heads + lane
        dk, dv = token_gradients(
            dk, dv, raw, values, GATE + gates, COSINE + gates, ROOT + gates, gate_m, gate_t, keep,
            NORM + wide * heads + lane, tl.cast(batch, tl.int64) * heads, KM, VM, VA, KA, map_m, base, part, logits,
            M, D, BD,
        )  # fmt: skip
        store_tile(DV + target, start, dk_t, columns, there, dv, D, BD)
    store_tile(DK + target, start, dk_t, columns, there, dk, D, BD)
