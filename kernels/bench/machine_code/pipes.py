"""The rate that a loop's instructions allow: an ESTIMATE from the instructions' mix, no measurement.

An SM has several pipes that work at the same time. For one iteration of a loop, by all warps of a block, each pipe takes
some clocks; the roof is the clocks that the needed multiply-adds take on the tensor cores at their full rate, divided
by those of the busiest pipe. Latencies, waits, bank conflicts and the blocks beside it are left out: no kernel is
faster than its roof, and many are slower.

``narrow`` counts tensor cores, the operands that they read from shared memory, and the instructions issued; ``wide``
also the other traffic of shared memory, exp2, and the arithmetic pipes. ``alternating`` is what is left where dots and
everything else never run at the same time: warps that all wait for a dot, then all compute a softmax.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.machine_code.sass import Instruction


@dataclass(frozen=True)
class Rates:
    """Of an SM, each clock: ``macs`` dense bf16 multiply-adds of the target's own instruction, and of ``mma.sync``, bytes of
    shared memory, lanes of exp2, of fp32 and of integer arithmetic, and instructions of a warp issued.

    Sources: NVIDIA's A100, H100 and B200 white papers, CUDA C++ Programming Guide (arithmetic throughput). That HMMA has
    half of HGMMA's rate on sm_90, and a quarter of UTC*MMA's on sm_100, is assumed.
    """

    macs: int
    macs_hmma: int
    shared: int = 128
    exp2: int = 16
    fp32: int = 128
    integer: int = 64
    issued: int = 4


# On sm_86 as for the data sheets' A40: half of sm_80's tensor cores, twice its fp32.
RATES = {
    "sm_80": Rates(1024, 1024, fp32=64),
    "sm_86": Rates(512, 512),
    "sm_90": Rates(2048, 1024),
    "sm_100": Rates(4096, 1024),
}
FP32 = {"FFMA", "FADD", "FMUL", "IMAD"}
INTEGER = set("FMNMX FMNMX3 FSEL FSETP F2FP IADD3 VIADD ISETP LEA LOP3 MOV PLOP3 PRMT SEL SHF".split())
DOTS, NARROW = ("tensor", "operands"), ("tensor", "operands", "issued")


def clocks(loop: Sequence[Instruction], warps: int, macs: int, target: str) -> dict[str, float]:
    """Of each pipe, for one iteration by all warps; ``macs``: those done by the tensor cores, not those needed."""
    rates = RATES[target]
    hmma = any(x.op == "HMMA" for x in loop)
    reads = sum(operand_bytes(x) for x in loop)
    return {
        "tensor": macs / (rates.macs_hmma if hmma else rates.macs),
        "operands": warps * reads / rates.shared,
        "issued": warps * len(loop) / rates.issued,
        "shared": warps * (reads + sum(moved_bytes(x) for x in loop)) / rates.shared,
        "exp2": warps * 32 * sum(x.op == "MUFU" for x in loop) / rates.exp2,
        "fp32": warps * 32 * sum(x.op in FP32 for x in loop) / rates.fp32,
        "integer": warps * 32 * sum(x.op in INTEGER for x in loop) / rates.integer,
    }


def operand_bytes(x: Instruction) -> float:
    """What a tensor-core operand takes from shared memory, for each warp. HGMMA serves four; A may lie in registers."""
    if x.op == "LDSM":
        return 128 * int(x.full[-1]) if x.full[-1] in "24" else 128
    if x.op != "HGMMA":
        return 0
    columns, depth = re.search(r"\.64x(\d+)x(\d+)", x.full).groups()
    in_registers = re.match(r"R\d+, R\d+, gdesc", x.operands)
    return 2 * int(depth) * (int(columns) + (0 if in_registers else 64)) / 4


def moved_bytes(x: Instruction) -> int:
    """What a warp's other instructions move through shared memory, without conflicts."""
    if x.op not in ("LDS", "STS", "LDGSTS"):
        return 0
    return 32 * next((int(bits) // 8 for bits in ("128", "64") if x.full.endswith("." + bits)), 4)


def roofs(clocks: dict[str, float], macs: int, target: str) -> tuple[float, float, float]:
    """(narrow, wide, alternating) in percent of the tensor cores' rate; ``macs``: those needed."""
    ideal = macs / RATES[target].macs
    dots = max(clocks[name] for name in DOTS)
    others = max(x for name, x in clocks.items() if name not in DOTS and name != "shared")
    wide = max(clocks.values())
    return tuple(round(100 * ideal / x, 1) for x in (max(clocks[name] for name in NARROW), wide, max(wide, dots + others)))
