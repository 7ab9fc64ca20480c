"""The queries' side of the backward pass; ``triton_keys.py`` has the other. Both are deterministic, without atomics.

``query_kernel`` owns a block of queries: dq, the gate's gradient from the scale of q and the affine map of the output,
and their share of the maps' gradients.

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
    sample_span,
    seen_by,
    store_tile,
    store_vector,
    unbend,
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
    GATE, gate_m, gate_t, KM, VM, KA, VA, map_m,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """dq' / scale (BM, BD) of a block of queries q = q', over the keys low … high; inward dA, lse in units of log2."""
    dinner = tl.zeros((q.shape[0], BD), dtype=tl.float32)
    columns = tl.arange(0, BN)
    for start in range(low, high, BN):
        key = start + columns
        there = key < keys
        if VALID is not None:
            there = there & (tl.load(VALID + key, mask=there, other=0) != 0)
        k = load_tile(K, start, stride_k, columns, there, D, BD)
        v = load_tile(V, start, stride_v, columns, there, D, BD)
        if TOKEN:
            gates = GATE + start * gate_t
            k, v = infused_pair(
                k, v, gates, gate_m, gate_t, columns, there, KM, VM, KA, VA, map_m, base, M, D, BD
            )  # fmt: skip
        bent = bend(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, SOFTCAP)
        seen = seen_by(position[:, None], key[None, :], there[None, :], window, CAUSAL, WINDOW)
        weights = tl.where(seen, tl.exp2(bent * LOG2E - lse[:, None]), 0.0)
        dweights = tl.dot(inward, tl.trans(v), input_precision="ieee")
        dscores = unbend(weights * (dweights - delta[:, None]), bent, softcap, SOFTCAP)
        dinner = tl.dot(dscores.to(k.dtype), k, dinner, input_precision="ieee")
    return dinner


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
    low, high = key_range(start + past, start + past + BM - 1, keys, window, BN, CAUSAL, WINDOW)
    if start >= queries:
        high = low
    dinner = query_gradient(
        q, inward, lse, delta, K, V, low, high, k_t, v_t, position, VALID, keys, window, softcap, scale, base,
        GATE, gate_m, gate_t, KM, VM, KA, VA, map_m, M, D, BD, BN, CAUSAL, WINDOW, SOFTCAP, TOKEN,
    )  # fmt: skip
    dinner *= scale
    if not TOKEN:
        raw = without_hidden(load_tile(Q, start, q_t, rows, shown, D, BD), VALID, position, keep)
        raw = raw.to(tl.float32) * dinner
        query_shares(raw, gates, gate_m, gate_t, rows, shown, keep, KM, map_m, dgates, out_m, part, M, D, BD)
        dinner *= factor(gates, gate_m, gate_t, rows, shown, KM, map_m, base, M, D, BD)
    if DQ is not None:
        DQ += wide * o_b + head * o_h + first * o_t
        store_tile(DQ, start, o_t, rows, keep, dinner, D, BD)
