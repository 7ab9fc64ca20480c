"""The gate's kernels: one read of the values, then scans over two scalars per token and head.

The mathematics is at gate.py. ``TOKEN``: every token is its own sum; ``WHOLE`` (the gate 'sequence'): one sum for all.
"""

import triton
import triton.language as tl

from mitrain_kernels.infused_attention.triton_forward import load_tile, load_vector, sample_span


@triton.jit
def opened(cosine, logit, there):
    """σ(logit + cosine), 0 where the modality is missing (``there`` 0), whatever its logit."""
    return tl.where(there > 0.0, 1.0 / (1.0 + tl.exp(-(cosine + logit))), 0.0)


@triton.jit(do_not_specialize=["tokens", "offset"])
def sums_kernel(
    V, VA, VALID, BOUNDS, DOT, SQUARE, v_b, v_h, v_t, valid_b, dot_m, dot_b, dot_h, square_b, square_h,
    batch, heads, group, tokens, offset,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Each token's V·v_add and ‖V‖², 0 for padding. Grid: (blocks of tokens, key/value heads, samples).

    The tokens are those from ``offset`` on: DOT (M, B, H, T), SQUARE (B, G, T) start there.
    """
    shared, sample = tl.program_id(1), tl.program_id(2)
    first, tokens, _ = sample_span(BOUNDS, sample, tokens, tokens)
    start, columns = tl.program_id(0) * BN, tl.arange(0, BN)
    inside = start + columns < tokens
    wide = sample.to(tl.int64)
    keep = inside
    if VALID is not None:
        keep = keep & (tl.load(VALID + wide * valid_b + offset + start + columns, mask=keep, other=0) != 0)
    V += wide * v_b + shared * v_h + (first + offset) * v_t
    v = load_tile(V, start, v_t, columns, keep, D, BD).to(tl.float32)
    at = first + start + columns
    tl.store(SQUARE + wide * square_b + shared * square_h + at, tl.sum(v * v, 1), mask=inside)
    for member in range(0, group):
        head = shared * group + member
        place = (wide * heads + head) * D
        for m in tl.static_range(M):
            v_add = load_vector(VA + m * tl.cast(batch, tl.int64) * heads * D + place, D, BD)
            dot = tl.sum(v * v_add[None, :], 1)
            tl.store(DOT + m * dot_m + wide * dot_b + head * dot_h + at, dot, mask=inside)


@triton.jit(do_not_specialize=["tokens", "offset"])
def gate_kernel(
    DOT, SQUARE, VALID, BOUNDS, BEFORE_DOT, BEFORE_SQUARE, BEFORE_COUNT, NORM, LOGIT, PRESENT,
    GATE, COSINE, ROOT, SUM_DOT, SUM_SQUARE, COUNT,
    valid_b, dot_m, dot_b, dot_h, square_b, square_h, gate_m, gate_b, gate_h, total_m, total_b, total_h,
    whole_b, whole_h, count_b,
    batch, heads, group, tokens, offset, eps,
    M: tl.constexpr, BT: tl.constexpr, WHOLE: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """Sums and gates from each token's own DOT (M, B, H, T) and SQUARE (B, G, T). Grid: (heads, samples).

    Written: GATE, COSINE, ROOT (M, B, H, T'); the running sums SUM_DOT (M, B, H, T'), SUM_SQUARE (B, G, T') by the first
    head of each group, COUNT (B, T') by the first of all. BEFORE_*: the sums that earlier tokens left.
    """
    head, sample = tl.program_id(0), tl.program_id(1)
    first, tokens, _ = sample_span(BOUNDS, sample, tokens, tokens)
    wide = sample.to(tl.int64)
    shared = head // group
    columns = tl.arange(0, BT)
    leads = columns * 0 + head % group == 0
    starts = columns * 0 + head == 0
    dots = DOT + wide * dot_b + head * dot_h + first
    squares = SQUARE + wide * square_b + shared * square_h + first
    place = first
    if WHOLE:
        place = first * 0
    gates = wide * gate_b + head * gate_h + place
    totals = SUM_DOT + wide * total_b + head * total_h + place
    wholes = SUM_SQUARE + wide * whole_b + shared * whole_h + place
    counts = COUNT + wide * count_b + place
    for m in tl.static_range(M):
        row = (m * tl.cast(batch, tl.int64) + wide) * heads + head
        norm, logit = tl.load(NORM + row), tl.load(LOGIT + m * heads + head)
        there = 1.0
        if PRESENT is not None:
            there = tl.load(PRESENT + m * batch + sample).to(tl.float32)
        dot_before, square_before, count_before = 0.0, 0.0, 0.0
        if BEFORE_DOT is not None:
            dot_before += tl.load(BEFORE_DOT + row)
            square_before += tl.load(BEFORE_SQUARE + wide * (heads // group) + shared)
            count_before += tl.load(BEFORE_COUNT + wide)
        for start in range(0, tokens, BT):
            inside = start + columns < tokens
            counted = inside
            if VALID is not None:
                valid = tl.load(VALID + wide * valid_b + offset + start + columns, mask=inside, other=0)
                counted = inside & (valid != 0)
            dot = tl.load(dots + m * dot_m + start + columns, mask=inside, other=0.0)
            square = tl.load(squares + start + columns, mask=inside, other=0.0)
            count = counted.to(tl.float32)
            if not TOKEN:
                dot = tl.cumsum(dot, 0) + dot_before
                square = tl.cumsum(square, 0) + square_before
                count = tl.cumsum(count, 0) + count_before
                last = columns == BT - 1
                dot_before = tl.sum(tl.where(last, dot, 0.0), 0)
                square_before = tl.sum(tl.where(last, square, 0.0), 0)
                count_before = tl.sum(tl.where(last, count, 0.0), 0)
            if not WHOLE:
                if TOKEN:
                    count = tl.zeros((BT,), dtype=tl.float32) + 1.0
                root = 1.0 / tl.sqrt(square * count * norm + eps * eps)
                cosine = dot * root
                at = gates + m * gate_m + start + columns
                tl.store(GATE + at, opened(cosine, logit, there), mask=inside)
                tl.store(COSINE + at, cosine, mask=inside)
                tl.store(ROOT + at, root, mask=inside)
                tl.store(totals + m * total_m + start + columns, dot, mask=inside)
                tl.store(wholes + start + columns, square, mask=inside & leads)
                tl.store(counts + start + columns, count, mask=inside & starts)
        if WHOLE:
            root = 1.0 / tl.sqrt(square_before * count_before * norm + eps * eps)
            cosine = dot_before * root
            tl.store(GATE + gates + m * gate_m, opened(cosine, logit, there))
            tl.store(COSINE + gates + m * gate_m, cosine)
            tl.store(ROOT + gates + m * gate_m, root)
            tl.store(totals + m * total_m, dot_before)
            if head % group == 0:
                tl.store(wholes, square_before)
            if head == 0:
                tl.store(counts, count_before)


@triton.jit
def whole_gradient(UPSTREAM, COSINE, ROOT, there, logit, tokens, early, BT: tl.constexpr):
    """The logit's gradient where one gate serves the queries from token ``early`` on; also its cosine and root."""
    columns = tl.arange(0, BT)
    dgate = 0.0
    for start in range(0, tokens, BT):
        inside = (start + columns < tokens) & (start + columns >= early)
        dgate += tl.sum(tl.load(UPSTREAM + start + columns, mask=inside, other=0.0), 0)
    cosine, root = tl.load(COSINE), tl.load(ROOT)
    gate = opened(cosine, logit, there)
    return dgate * gate * (1.0 - gate), cosine, root


@triton.jit(do_not_specialize=["tokens", "queries"])
def gate_backward_kernel(
    DGATE, COSINE, ROOT, SUM_SQUARE, COUNT, BOUNDS, NORM, LOGIT, PRESENT,
    OUT_DOT, OUT_SQUARE, OUT_NORM, DLOGIT,
    dgate_m, dgate_b, dgate_h, gate_m, gate_b, gate_h, whole_b, whole_h, count_b,
    out_m, out_b, out_h, pair_b, pair_h,
    batch, heads, group, tokens, queries,
    M: tl.constexpr, BT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What DGATE (M, B, H, Tq) sends to every summed token, last to first, padding included. Grid: (heads, samples).

    Written: OUT_DOT (M, B, H, T), OUT_SQUARE (B, H, T), so that dL/dV_j = Σ OUT_DOT_j v_add − OUT_SQUARE_j V_j;
    OUT_NORM (M, B, H): dL/d v_add has − OUT_NORM v_add; DLOGIT (M, B, H).
    The sums are of ``tokens`` tokens, the gates of the last ``queries`` of them.
    """
    head, sample = tl.program_id(0), tl.program_id(1)
    first, tokens, _ = sample_span(BOUNDS, sample, tokens, tokens)
    if BOUNDS is not None:
        queries = tokens
    wide = sample.to(tl.int64)
    shared = head // group
    columns = tl.arange(0, BT)
    early = tokens - queries
    place = first
    if WHOLE:
        place = first * 0
    gates = wide * gate_b + head * gate_h + place
    wholes = SUM_SQUARE + wide * whole_b + shared * whole_h + place
    counts = COUNT + wide * count_b + place
    outs = wide * out_b + head * out_h + first
    pairs = wide * pair_b + head * pair_h + first
    blocks = tl.cdiv(tokens, BT)
    for m in tl.static_range(M):
        row = (m * tl.cast(batch, tl.int64) + wide) * heads + head
        norm, logit = tl.load(NORM + row), tl.load(LOGIT + m * heads + head)
        there = 1.0
        if PRESENT is not None:
            there = tl.load(PRESENT + m * batch + sample).to(tl.float32)
        dlogit, of_norm, dot_after, square_after = 0.0, 0.0, 0.0, 0.0
        upstream = DGATE + m * dgate_m + wide * dgate_b + head * dgate_h + first - early
        if WHOLE:
            at = gates + m * gate_m
            dlogit, cosine, root = whole_gradient(upstream, COSINE + at, ROOT + at, there, logit, tokens, early, BT)
            dot_after = dlogit * root
            w = dot_after * cosine * root
            count = tl.load(counts)
            of_norm = w * tl.load(wholes) * count
            square_after = w * norm * count
        for i in range(0, blocks):
            start = (blocks - 1 - i) * BT
            inside = start + columns < tokens
            dot = tl.zeros((BT,), dtype=tl.float32) + dot_after
            square = tl.zeros((BT,), dtype=tl.float32) + square_after
            if not WHOLE:
                gated = inside & (start + columns >= early)
                at = gates + m * gate_m + start + columns - early
                cosine = tl.load(COSINE + at, mask=gated, other=0.0)
                root = tl.load(ROOT + at, mask=gated, other=0.0)
                count = tl.load(counts + start + columns - early, mask=gated, other=0.0)
                energy = tl.load(wholes + start + columns - early, mask=gated, other=0.0) * count
                gate = opened(cosine, logit, there)
                e = tl.load(upstream + start + columns, mask=gated, other=0.0) * gate * (1.0 - gate)
                own_dot = e * root
                w = own_dot * cosine * root
                own_square = w * norm * count
                dlogit += tl.sum(e, 0)
                of_norm += tl.sum(w * energy, 0)
                dot += own_dot + (tl.sum(own_dot, 0) - tl.cumsum(own_dot, 0))
                square += own_square + (tl.sum(own_square, 0) - tl.cumsum(own_square, 0))
                dot_after += tl.sum(own_dot, 0)
                square_after += tl.sum(own_square, 0)
            tl.store(OUT_DOT + m * out_m + outs + start + columns, dot, mask=inside)
            if m > 0:
                square += tl.load(OUT_SQUARE + pairs + start + columns, mask=inside, other=0.0)
            tl.store(OUT_SQUARE + pairs + start + columns, square, mask=inside)
        tl.store(OUT_NORM + row, of_norm)
        tl.store(DLOGIT + row, dlogit)


@triton.jit(do_not_specialize=["tokens", "offset"])
def values_kernel(
    V, DOT, PARTS, VALID, BOUNDS, v_b, v_h, v_t, valid_b, dot_m, dot_b, dot_h,
    batch, heads, group, tokens, offset,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """PARTS (blocks, M, B, H, D): each block's Σ_j DOT_j V_j. Grid: (blocks of tokens, key/value heads, samples)."""
    shared, sample = tl.program_id(1), tl.program_id(2)
    first, tokens, _ = sample_span(BOUNDS, sample, tokens, tokens)
    start, columns = tl.program_id(0) * BN, tl.arange(0, BN)
    keep = start + columns < tokens
    wide = sample.to(tl.int64)
    if VALID is not None:
        keep = keep & (tl.load(VALID + wide * valid_b + offset + start + columns, mask=keep, other=0) != 0)
    V += wide * v_b + shared * v_h + (first + offset) * v_t
    v = load_tile(V, start, v_t, columns, keep, D, BD).to(tl.float32)
    width = tl.arange(0, BD)
    for member in range(0, group):
        head = shared * group + member
        for m in tl.static_range(M):
            at = DOT + m * dot_m + wide * dot_b + head * dot_h + first + start + columns
            dot = tl.load(at, mask=keep, other=0.0)
            row = ((tl.program_id(0).to(tl.int64) * M + m) * batch + wide) * heads + head
            tl.store(PARTS + row * D + width, tl.sum(dot[:, None] * v, 0), mask=width < D)
