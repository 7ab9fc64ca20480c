"""Small kernels that the auditor must accept or refuse, according to the tile they are compiled with."""

import triton
import triton.language as tl


@triton.jit
def product(A, B, C, M, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """C = A B for row-major A (M, K) and B (K, N); PRECISION "ieee" or "tf32" turns the operands into fp32."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, K, DEPTH):
        a = tl.load(A + rows[:, None] * K + (k + depth)[None, :])
        b = tl.load(B + (k + depth)[:, None] * N + columns[None, :])
        if PRECISION == "none":
            total = tl.dot(a, b, total)
        else:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    tl.store(C + rows[:, None] * N + columns[None, :], total.to(C.dtype.element_ty))


@triton.jit
def elementwise_product(A, B, C, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """C = A B with the sum over K written out: right, but off the tensor cores."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(K):
        a = tl.load(A + rows * K + k).to(tl.float32)
        b = tl.load(B + k * COLUMNS + columns).to(tl.float32)
        total += a[:, None] * b[None, :]
    tl.store(C + rows[:, None] * COLUMNS + columns[None, :], total.to(C.dtype.element_ty))
