"""The backward kernels: one per side of the attention matrix, both deterministic, without atomics.

``query_kernel`` owns a block of queries: dq, the gate's gradient from the scale of q and the affine map of the output,
and their share of the maps' gradients. ``key_kernel`` owns a block of keys: dK and dV, over the queries of all heads
that share them. Under the gate 'token' the keys' side has the maps' gradients, one query head per program.

where: A the plain attention's output, α, γ, δ as at ``infused_attention_folded``, dA = dO ⊙ γ, D = Σ dA ⊙ A.
"""

import triton
import triton.language as tl

from mitrain_kernels.infused_attention.triton_tile import (
    LOG2E,
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
    unbend,
)


@triton.jit
def store_vector(base, x, D: tl.constexpr, BD: tl.constexpr):
    columns = tl.arange(0, BD)
    tl.store(base + columns, x, mask=columns < D)


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def query_kernel(
    Q, K, V, ATTENDED, DOUT, LSE, DELTA, DQ, DGATE, PARTS, GATE, KM, VM, VA, KA, BASE, VALID, BOUNDS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, d_b, d_h, d_t, lse_b, lse_h,
    gate_m, gate_b, gate_h, gate_t, out_m, out_b, out_h, valid_b,
    batch, heads, group, queries, keys, window, softcap, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """Grid as forward. DGATE (M, B, H, Tq); PARTS (blocks, 3, M, B, H, D): shares of d k_mul, d v_mul, d v_add for a
    given gate; DELTA: D of each query, for the keys' side. DQ None: q itself needs no gradient.
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
    KM += place
    VM += place
    VA += place
    if KA is not None:
        KA += place
    if VALID is not None:
        VALID += wide * valid_b
    base = tl.load(BASE + sample)
    gates = GATE + start.to(tl.int64) * gate_t
    lse = tl.load(LSE + scalars + rows, mask=keep, other=float("inf"))
    shown = keep & (lse != float("inf"))
    dout = load_tile(DOUT, start, d_t, rows, shown, D, BD).to(tl.float32)
    attended = load_tile(ATTENDED, start, o_t, rows, shown, D, BD).to(tl.float32)
    dgates = DGATE + wide * out_b + head * out_h + first + start + rows
    inward = dout
    if not TOKEN:
        product = dout * attended
        for m in tl.static_range(M):
            gate = tl.load(gates + m * gate_m + rows * gate_t, mask=shown, other=0.0)
            v_mul, v_add = load_vector(VM + m * map_m, D, BD), load_vector(VA + m * map_m, D, BD)
            slopes = tl.sum(product * v_mul[None, :] + dout * v_add[None, :], 1)
            tl.store(dgates + m * out_m, slopes, mask=keep)
            store_vector(part + (M + m) * map_m, tl.sum(gate[:, None] * product, 0), D, BD)
            store_vector(part + (2 * M + m) * map_m, tl.sum(gate[:, None] * dout, 0), D, BD)
        inward = dout * factor(gates, gate_m, gate_t, rows, shown, VM, map_m, base, M, D, BD)
    delta = tl.sum(inward * attended, 1)
    tl.store(DELTA + scalars + rows, delta, mask=keep)
    q = load_tile(Q, start, q_t, rows, keep, D, BD)
    if not TOKEN:
        q = (q.to(tl.float32) * factor(gates, gate_m, gate_t, rows, shown, KM, map_m, base, M, D, BD)).to(q.dtype)
    inward = inward.to(q.dtype)
    low, high = key_range(start + past, start + past + BM - 1, keys, window, BN, CAUSAL, WINDOW)
    if start >= queries:
        high = low
    dinner = tl.zeros((BM, BD), dtype=tl.float32)
    columns = tl.arange(0, BN)
    for key_start in range(low, high, BN):
        key = key_start + columns
        there = key < keys
        if VALID is not None:
            there = there & (tl.load(VALID + key, mask=there, other=0) != 0)
        k = load_tile(K, key_start, k_t, columns, there, D, BD)
        v = load_tile(V, key_start, v_t, columns, there, D, BD)
        if TOKEN:
            own = GATE + key_start * gate_t
            k, v = infused_pair(
                k, v, own, gate_m, gate_t, columns, there, KM, VM, KA, VA, map_m, base, M, D, BD
            )  # fmt: skip
        bent = bend(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, SOFTCAP)
        seen = seen_by(position[:, None], key[None, :], there[None, :], window, CAUSAL, WINDOW)
        weights = tl.where(seen, tl.exp2(bent * LOG2E - lse[:, None]), 0.0)
        dweights = tl.dot(inward, tl.trans(v), input_precision="ieee")
        dscores = unbend(weights * (dweights - delta[:, None]), bent, softcap, SOFTCAP)
        dinner = tl.dot(dscores.to(k.dtype), k, dinner, input_precision="ieee")
    dinner *= scale
    if not TOKEN:
        raw = load_tile(Q, start, q_t, rows, shown, D, BD).to(tl.float32) * dinner
        for m in tl.static_range(M):
            gate = tl.load(gates + m * gate_m + rows * gate_t, mask=shown, other=0.0)
            slopes = tl.load(dgates + m * out_m, mask=keep, other=0.0)
            slopes += tl.sum(raw * load_vector(KM + m * map_m, D, BD)[None, :], 1)
            tl.store(dgates + m * out_m, slopes, mask=keep)
            store_vector(part + m * map_m, tl.sum(gate[:, None] * raw, 0), D, BD)
        dinner *= factor(gates, gate_m, gate_t, rows, shown, KM, map_m, base, M, D, BD)
    if DQ is not None:
        DQ += wide * o_b + head * o_h + first * o_t
        store_tile(DQ, start, o_t, rows, keep, dinner, D, BD)


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def key_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, SUMS_DOT, SUMS_SQUARE, PARTS, DLOGIT,
    GATE, COSINE, ROOT, NORM, KM, VM, VA, KA, BASE, VALID, BOUNDS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, dk_b, dk_h, dk_t, lse_b, lse_h,
    gate_m, gate_b, gate_h, gate_t, sum_m, sum_b, sum_h, valid_b,
    batch, heads, group, queries, keys, window, softcap, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys, key/value heads, samples); under 'token' query heads take the place of key/value heads.

    SUMS_DOT (M, B, H, Tk), SUMS_SQUARE (B, H, Tk): what the gate's cosine sends to the values (None: nothing). Under
    'token' DK and DV are per query head, GATE, COSINE, ROOT (M, B, H, Tk), NORM (M, B, H) = ‖v_add‖²,
    PARTS (blocks, 4, M, B, H, D) shares of d k_mul, d v_mul, d v_add, d k_add; DLOGIT (blocks, M, B, H).
    """
    lane, sample = tl.program_id(1), tl.program_id(2)
    first, queries, keys = sample_span(BOUNDS, sample, queries, keys)
    block = tl.program_id(0)
    start = block * BN
    wide, past = sample.to(tl.int64), keys - queries
    columns, rows = tl.arange(0, BN), tl.arange(0, BM)
    keep = start + columns < keys
    if VALID is not None:
        VALID += wide * valid_b
        keep = keep & (tl.load(VALID + start + columns, mask=keep, other=0) != 0)
    shared = lane
    if TOKEN:
        shared = lane // group
    K += wide * k_b + shared * k_h + first * k_t
    V += wide * v_b + shared * v_h + first * v_t
    map_m = tl.cast(batch, tl.int64) * heads * D
    base = tl.load(BASE + sample)
    k = load_tile(K, start, k_t, columns, keep, D, BD)
    v = load_tile(V, start, v_t, columns, keep, D, BD)
    if TOKEN:
        place = (wide * heads + lane) * D
        KM += place
        VM += place
        VA += place
        if KA is not None:
            KA += place
        own = GATE + wide * gate_b + lane * gate_h + first * gate_t + start.to(tl.int64) * gate_t
        k, v = infused_pair(
            k, v, own, gate_m, gate_t, columns, keep, KM, VM, KA, VA, map_m, base, M, D, BD
        )  # fmt: skip
    dk = tl.zeros((BN, BD), dtype=tl.float32)
    dv = tl.zeros((BN, BD), dtype=tl.float32)
    low, high = query_range(start, start + BN - 1, queries, past, window, BM, CAUSAL, WINDOW)
    key = start + columns
    if start >= keys:
        high = low
    members = group
    if TOKEN:
        members = 1
    for member in range(0, members):
        head = lane * members + member
        place = (wide * heads + head) * D
        queries_at = Q + wide * q_b + head * q_h + first * q_t
        upstream_at = DOUT + wide * d_b + head * d_h + first * d_t
        scalars = wide * lse_b + head * lse_h + first
        for query_start in range(low, high, BM):
            there = query_start + rows < queries
            position = query_start + rows + past
            lse = tl.load(LSE + scalars + query_start + rows, mask=there, other=float("inf"))
            delta = tl.load(DELTA + scalars + query_start + rows, mask=there, other=0.0)
            q = load_tile(queries_at, query_start, q_t, rows, there, D, BD)
            inward = load_tile(upstream_at, query_start, d_t, rows, there, D, BD)
            if not TOKEN:
                gates = GATE + wide * gate_b + head * gate_h + (first + query_start) * gate_t
                alpha = factor(gates, gate_m, gate_t, rows, there, KM + place, map_m, base, M, D, BD)
                q = (q.to(tl.float32) * alpha).to(q.dtype)
                gamma = factor(gates, gate_m, gate_t, rows, there, VM + place, map_m, base, M, D, BD)
                inward = (inward.to(tl.float32) * gamma).to(q.dtype)
            bent = bend(tl.dot(k, tl.trans(q), input_precision="ieee") * scale, softcap, SOFTCAP)
            seen = seen_by(position[None, :], key[:, None], keep[:, None] & there[None, :], window, CAUSAL, WINDOW)
            weights = tl.where(seen, tl.exp2(bent * LOG2E - lse[None, :]), 0.0)
            dv = tl.dot(weights.to(q.dtype), inward.to(q.dtype), dv, input_precision="ieee")
            dweights = tl.dot(v, tl.trans(inward.to(v.dtype)), input_precision="ieee")
            dscores = unbend(weights * (dweights - delta[None, :]), bent, softcap, SOFTCAP)
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    dk *= scale
    values = load_tile(V, start, v_t, columns, keep, D, BD).to(tl.float32)
    if TOKEN:
        place = (wide * heads + lane) * D
        own = GATE + wide * gate_b + lane * gate_h + first * gate_t + start.to(tl.int64) * gate_t
        offset = wide * gate_b + lane * gate_h + (first + start) * gate_t + columns * gate_t
        raw = load_tile(K, start, k_t, columns, keep, D, BD).to(tl.float32)
        part = PARTS + block.to(tl.int64) * 4 * M * map_m + place
        through = tl.zeros((BN, BD), dtype=tl.float32)
        for m in tl.static_range(M):
            gate = tl.load(GATE + m * gate_m + offset, mask=keep, other=0.0)
            cosine = tl.load(COSINE + m * gate_m + offset, mask=keep, other=0.0)
            root = tl.load(ROOT + m * gate_m + offset, mask=keep, other=0.0)
            norm = tl.load(NORM + (m * tl.cast(batch, tl.int64) + wide) * heads + lane)
            v_add = load_vector(VA + m * map_m, D, BD)
            dgate = tl.sum(dk * raw * load_vector(KM + m * map_m, D, BD)[None, :], 1)
            dgate += tl.sum(dv * (values * load_vector(VM + m * map_m, D, BD)[None, :] + v_add[None, :]), 1)
            if KA is not None:
                dgate += tl.sum(dk * load_vector(KA + m * map_m, D, BD)[None, :], 1)
                store_vector(part + (3 * M + m) * map_m, tl.sum(gate[:, None] * dk, 0), D, BD)
            e = dgate * gate * (1.0 - gate)
            dot = e * root
            w = dot * cosine * root
            energy = tl.sum(w * tl.sum(values * values, 1), 0)
            through += dot[:, None] * v_add[None, :] - (w * norm)[:, None] * values
            store_vector(part + m * map_m, tl.sum(gate[:, None] * (dk * raw), 0), D, BD)
            store_vector(part + (M + m) * map_m, tl.sum(gate[:, None] * (dv * values), 0), D, BD)
            dv_add = tl.sum(gate[:, None] * dv + dot[:, None] * values, 0) - energy * v_add
            store_vector(part + (2 * M + m) * map_m, dv_add, D, BD)
            logit = DLOGIT + ((block.to(tl.int64) * M + m) * batch + wide) * heads + lane
            tl.store(logit, tl.sum(e, 0))
        dk *= factor(own, gate_m, gate_t, columns, keep, KM, map_m, base, M, D, BD)
        dv = dv * factor(own, gate_m, gate_t, columns, keep, VM, map_m, base, M, D, BD) + through
    elif SUMS_DOT is not None:
        for member in range(0, members):
            head = lane * members + member
            place = (wide * heads + head) * D
            at = wide * sum_b + head * sum_h + first + start + columns
            dv -= tl.load(SUMS_SQUARE + at, mask=keep, other=0.0)[:, None] * values
            for m in tl.static_range(M):
                dot = tl.load(SUMS_DOT + m * sum_m + at, mask=keep, other=0.0)
                dv += dot[:, None] * load_vector(VA + place + m * map_m, D, BD)[None, :]
    there = start + columns < keys
    target = wide * dk_b + lane * dk_h + first * dk_t
    store_tile(DK + target, start, dk_t, columns, there, dk, D, BD)
    store_tile(DV + target, start, dk_t, columns, there, dv, D, BD)
