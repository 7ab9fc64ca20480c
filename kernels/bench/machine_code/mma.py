"""How many multiply-adds a kernel's tensor-core instructions do, and how many its dots need.

Where a tile has fewer rows or columns than its warps cover, warps repeat each other: more is done than needed. Both are
counted by all warps of a block for one iteration of every loop; what a pipelined loop does before and after is left out.
"""

import math
import re
from collections.abc import Iterable

from bench.machine_code.sass import Instruction

DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x(?:bf16|f16)> \* tensor<\d+x(\d+)x(?:bf16|f16)>")
BY_WARPS = re.compile(r"HMMA\.(16)(8)(16)\.|HGMMA\.(\d+)x(\d+)x(\d+)\.")
BY_WAVE = re.compile(r"^\s+v_mfma_f32_(\d+)x(\d+)x(\d+)_?b?f16", re.MULTILINE)
LARGEST = (128, 256, 16)  # rows, columns, depth of an instruction of sm_100


def dots(ttir: str) -> list[tuple[int, int, int]]:
    """(rows, depth, columns) of every dot of 16-bit operands; all are in loops."""
    return [tuple(map(int, shape)) for shape in DOT.findall(ttir)]


def needed(ttir: str) -> int:
    return sum(map(math.prod, dots(ttir)))


def done(loop: Iterable[Instruction], warps: int, ttir: str) -> float:
    """By one iteration of a loop on sm_*."""
    return sum(done_by(x, warps, ttir) for x in loop)


def done_by(x: Instruction, warps: int, ttir: str) -> float:
    """Of one place in the code: HMMA is a warp's, HGMMA of four, UTC*MMA of a block."""
    if x.op.startswith("UTC") and "MMA" in x.op:
        return of_a_block(ttir)
    match = BY_WARPS.match(x.full + ".")
    return math.prod(int(n) for n in match.groups() if n) * (warps // 4 if x.op == "HGMMA" else warps) if match else 0


def of_a_block(ttir: str) -> float:
    """Of an instruction of sm_100 in the mean: its name hides its shape, which is the largest that fits in the dot."""
    fits = [(rows, depth, columns) for rows, depth, columns in dots(ttir) if rows >= 64]
    rows, columns, depth = LARGEST
    count = sum(-(-m // rows) * -(-n // columns) * -(-k // depth) for m, k, n in fits)
    return sum(map(math.prod, fits)) / count


def done_by_waves(assembler: str, waves: int) -> int:
    """On gfx942, where nothing is pipelined and each loop's instructions are listed once."""
    return waves * sum(math.prod(map(int, shape)) for shape in BY_WAVE.findall(assembler))
