"""The forward kernel: flash attention with the infusion on chip.

For gates that do not depend on the key, the query tile is scaled once (prologue) and the output once (epilogue); keys
and values are read as they are. Under the gate 'token' each tile of keys and values is infused as it arrives.
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
    sample_span,
    seen_by,
    shift,
    softmax_step,
    store_tile,
    without_hidden,
)


@triton.jit
def attend_keys(
    q, K, V, low, high, stride_k, stride_v, position, VALID, keys, window, softcap, scale, base,
    GATE, gate_m, gate_t, KM, VM, KA, VA, map_m, acc, top, total,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys low … high; acc (BM, BD), top (BM,) in units of log2, total (BM,)."""
    columns = tl.arange(0, BN)
    for start in range(low, high, BN):
        key = start + columns
        keep = key < keys
        if VALID is not None:
            keep = keep & (tl.load(VALID + key, mask=keep, other=0) != 0)
        k = load_tile(K, start, stride_k, columns, keep, D, BD)
        v = load_tile(V, start, stride_v, columns, keep, D, BD)
        if TOKEN:
            gates = GATE + start * gate_t
            k, v = infused_pair(
                k, v, gates, gate_m, gate_t, columns, keep, KM, VM, KA, VA, map_m, base, M, D, BD
            )  # fmt: skip
        scores = bend(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, SOFTCAP) * LOG2E
        if MASKED:
            seen = seen_by(position[:, None], key[None, :], keep[None, :], window, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        acc, top, total = softmax_step(scores, v, acc, top, total)
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
    KM += place
    VM += place
    VA += place
    if KA is not None:
        KA += place
    if VALID is not None:
        VALID += wide * valid_b
    base = tl.load(BASE + sample)
    gates = GATE + start.to(tl.int64) * gate_t
    q = without_hidden(load_tile(Q, start, q_t, rows, keep, D, BD), VALID, position, keep)
    if not TOKEN:
        q = (q.to(tl.float32) * factor(gates, gate_m, gate_t, rows, keep, KM, map_m, base, M, D, BD)).to(q.dtype)
    low, high = key_range(start + past, start + past + BM - 1, keys, window, BN, CAUSAL, WINDOW)
    middle = low
    if (VALID is None) and (not WINDOW):
        middle = keys // BN * BN
        if CAUSAL:
            middle = tl.minimum(start + past + 1, keys) // BN * BN
    acc = tl.zeros((BM, BD), dtype=tl.float32)
    top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    acc, top, total = attend_keys(
        q, K, V, low, middle, k_t, v_t, position, VALID, keys, window, softcap, scale, base,
        GATE, gate_m, gate_t, KM, VM, KA, VA, map_m, acc, top, total,
        M, D, BD, BN, False, CAUSAL, WINDOW, SOFTCAP, TOKEN,
    )  # fmt: skip
    acc, top, total = attend_keys(
        q, K, V, middle, high, k_t, v_t, position, VALID, keys, window, softcap, scale, base,
        GATE, gate_m, gate_t, KM, VM, KA, VA, map_m, acc, top, total,
        M, D, BD, BN, True, CAUSAL, WINDOW, SOFTCAP, TOKEN,
    )  # fmt: skip
    sees = total > 0.0
    attended = acc / tl.where(sees, total, 1.0)[:, None]
    if LSE is not None:
        lse = tl.where(sees, top + tl.log2(tl.where(sees, total, 1.0)), float("inf"))
        tl.store(LSE + wide * lse_b + head * lse_h + first + start + rows, lse, mask=keep)
        store_tile(ATTENDED + out, start, o_t, rows, keep, attended, D, BD)
    if not TOKEN:
        shown = keep & sees
        attended *= factor(gates, gate_m, gate_t, rows, shown, VM, map_m, base, M, D, BD)
        attended += shift(gates, gate_m, gate_t, rows, shown, VA, map_m, M, D, BD)
    store_tile(OUT + out, start, o_t, rows, keep, attended, D, BD)
