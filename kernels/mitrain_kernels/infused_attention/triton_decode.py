"""Decoding: one query per head against a long cache, the keys split over programs (split-K), then merged.

The query heads that share a key/value head are the rows of one tile, so that each key is read once.
"""

import triton
import triton.language as tl

from mitrain_kernels.infused_attention.triton_tile import (
    LOG2E,
    bend,
    load_tile,
    load_vector,
    seen_by,
    softmax_step,
    store_tile,
)


@triton.jit(do_not_specialize=["keys", "window", "share"])
def split_kernel(
    Q, K, V, PARTS, TOPS, TOTALS, GATE, KM, BASE, VALID,
    q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t, gate_m, gate_b, gate_h, valid_b,
    batch, heads, group, keys, window, softcap, scale, share,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Grid: (splits, key/value heads, samples); each takes ``share`` keys.

    PARTS (splits, B, H, D), TOPS and TOTALS (splits, B, H): softmax sums over the share, relative to its own maximum.
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
        scores = bend(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, SOFTCAP) * LOG2E
        seen = seen_by(keys - 1, key[None, :], there[None, :], window, True, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        acc, top, total = softmax_step(scores, v, acc, top, total)
    row = (split.to(tl.int64) * batch + wide) * heads + first
    store_tile(PARTS + row * D, first * 0, D, member, keep, acc, D, BD)
    tl.store(TOPS + row + member, top, mask=keep)
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
