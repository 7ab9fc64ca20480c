"""What a compiled kernel may not do, read off its machine code: spill, miss the tensor cores, not fit.

On sm_* the code is disassembled by Triton's own cuobjdump; on gfx942 the assembler text carries the figures. The
rules are in ``violations``, one readable reason each.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel

from bench.machine_code import mma, pipes, sass
from bench.machine_code.compilation import Case


@dataclass(frozen=True)
class Limits:
    """Of one target, in bytes, 32-bit registers and warps. Sources: CUDA C++ Programming Guide, compute capabilities;
    AMD CDNA3 ISA guide (a compute unit stands for an SM, and 512 registers per lane serve the waves of each SIMD)."""

    mma: str
    shared_per_block: int
    shared_per_sm: int
    shared_reserved: int
    warps_per_sm: int
    blocks_per_sm: int


LIMITS = {
    "sm_80": Limits("HMMA", 166912, 167936, 1024, 64, 32),
    "sm_86": Limits("HMMA", 101376, 102400, 1024, 48, 16),
    "sm_90": Limits("HGMMA", 232448, 233472, 1024, 64, 32),
    "sm_100": Limits("UTC*MMA", 232448, 233472, 1024, 64, 32),
    "gfx942": Limits("MFMA", 65536, 65536, 0, 32, 16),
}
REGISTERS_PER_SM, REGISTERS_PER_WARP_STEP = 65536, 256
SIMDS, REGISTERS_PER_LANE, REGISTERS_PER_LANE_STEP = 4, 512, 8
TENSOR_MEMORY_COLUMNS = 512  # of an SM of sm_100
MINIMUM_ROWS = 64  # of a dot that HGMMA and UTC*MMA take
IR_DOT = re.compile(r"tt\.dot .*: tensor<([0-9x]+)x(\w+)> \* tensor<.*> -> tensor<([0-9x]+)x\w+>")


@dataclass(frozen=True)
class Facts:
    """Of one compiled kernel.

    where:
        mma: tensor-core instructions by family: those of bf16 and fp16 under the target's names, "TF32", "FP32".
        macs, macs_needed: 16-bit multiply-adds of the tensor cores (``mma.py``).
        roofs: (narrow, wide, alternating) of the shortest tensor-core loops in percent (``pipes.py``), () if there is none.
        dot_rows, wide_dots: of the source's dots, rows of those with 16-bit operands, operand types of the others.
    """

    registers: int
    spills: int
    spills_in_loops: int
    spills_in_mma_loops: int
    shared_bytes: int
    tensor_memory: int
    warps: int
    instructions: int
    async_copies: int
    mma: Counter[str] = field(default_factory=Counter)
    macs: int = 0
    macs_needed: int = 0
    roofs: tuple[float, ...] = ()
    dot_rows: tuple[int, ...] = ()
    wide_dots: tuple[str, ...] = ()


def facts_of(kernel: CompiledKernel, target: str, useful: float = 1.0) -> Facts:
    """``useful``: as of the `Case`."""
    return amd_facts(kernel) if target.startswith("gfx") else nvidia_facts(kernel, target, useful)


def nvidia_facts(kernel: CompiledKernel, target: str, useful: float) -> Facts:
    usage, listing = disassemble(kernel.asm["cubin"])
    code = [instruction for function in sass.functions(listing) for instruction in function]
    return Facts(
        registers=max(int(x) for x in re.findall(r"REG:(\d+)", usage)),
        spills=sass.count(sass.SPILL, code),
        spills_in_loops=spills_in(sass.loops(listing)),
        spills_in_mma_loops=spills_in(sass.tensor_core_loops(listing)),
        instructions=len(code),
        async_copies=sass.count(sass.ASYNC_COPY, code),
        mma=Counter(nvidia_family(x) for x in code if sass.TENSOR_CORE.fullmatch(x.op)),
        **loop_facts(kernel, listing, target, useful),
        **common_facts(kernel),
    )


def loop_facts(kernel: CompiledKernel, listing: str, target: str, useful: float) -> dict[str, Any]:
    """What all tensor-core loops do, and the roofs of the shortest, which for attention is that of tiles without a mask.

    Of a kernel that runs through its tiles twice, for dV and for dK, the loops differ in their dots: of each kind the
    shortest counts, and their clocks add up.
    """
    warps, ttir = kernel.metadata.num_warps, kernel.asm["ttir"]
    shortest: dict[float, list[sass.Instruction]] = {}
    total = 0.0
    for loop in sorted(sass.tensor_core_loops(listing), key=len):
        done = mma.done(loop, warps, ttir)
        total += done
        shortest.setdefault(done, loop)
    if not total:
        return {}
    needed = useful * mma.needed(ttir) * sum(shortest) / total
    each = [pipes.clocks(loop, warps, done, target) for done, loop in shortest.items()]
    clocks = {name: sum(found[name] for found in each) for name in each[0]}
    return {"macs": round(total), "roofs": pipes.roofs(clocks, needed, target)}


def nvidia_family(instruction: sass.Instruction) -> str:
    if "TF32" in instruction.full:
        return "TF32"
    return "UTC*MMA" if instruction.op.startswith("UTC") else instruction.op


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[knobs.nvidia.cuobjdump.path, flag, file.name] for flag in ("--dump-resource-usage", "-sass")]
        usage, listing = (subprocess.run(x, check=True, capture_output=True, text=True).stdout for x in commands)
    return usage, listing


def spills_in(loops: list[list[sass.Instruction]]) -> int:
    """Spilling instructions in any of the loops, each counted once."""
    return len({id(x) for loop in loops for x in loop if sass.SPILL.fullmatch(x.op)})


def amd_facts(kernel: CompiledKernel) -> Facts:
    text = kernel.asm["amdgcn"]
    spilled = largest(text, "vgpr_spill_count")
    return Facts(
        registers=largest(text, "vgpr_count"),
        spills=spilled,
        spills_in_loops=spilled,
        spills_in_mma_loops=spilled,
        instructions=len(re.findall(r"^\s+[vs]_\w+|^\s+(?:ds|global|buffer|scratch|flat)_\w+", text, re.MULTILINE)),
        async_copies=len(re.findall(r"^\s+buffer_load_\w+ .*\blds\b", text, re.MULTILINE)),
        mma=Counter(amd_family(name) for name in re.findall(r"^\s+(v_mfma_\w+)", text, re.MULTILINE)),
        macs=mma.done_by_waves(text, kernel.metadata.num_warps),
        **common_facts(kernel),
    )


def amd_family(name: str) -> str:
    """Of an instruction like v_mfma_f32_32x32x8_bf16 or, in an older spelling, v_mfma_f32_32x32x2f32."""
    operand = re.search(r"(xf32|f32|f16)(_1k)?$", name)
    return {"f16": "MFMA", "f32": "FP32", "xf32": "TF32"}[operand[1]] if operand else name


def largest(text: str, key: str) -> int:
    """The largest value of a key of the code object's metadata; ``vgpr_count`` includes the accumulation registers."""
    return max((int(x) for x in re.findall(rf"\.{key}:\s+(\d+)", text)), default=0)


def common_facts(kernel: CompiledKernel) -> dict[str, Any]:
    dots = IR_DOT.findall(kernel.asm["ttir"])
    return {
        "shared_bytes": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "warps": kernel.metadata.num_warps,
        "dot_rows": tuple(int(result.split("x")[-2]) for _, operand, result in dots if operand in ("bf16", "f16")),
        "macs_needed": mma.needed(kernel.asm["ttir"]),
        "wide_dots": tuple(sorted({operand for _, operand, _ in dots} - {"bf16", "f16"})),
    }


def blocks_per_sm(facts: Facts, target: str) -> int:
    """How many blocks run on an SM (compute unit) at a time; 0 if not even one fits."""
    limits = LIMITS[target]
    fits = [limits.warps_per_sm // facts.warps, limits.blocks_per_sm]
    if target.startswith("gfx"):
        waves = REGISTERS_PER_LANE // round_up(max(facts.registers, 1), REGISTERS_PER_LANE_STEP)
        fits.append(SIMDS * waves // facts.warps)
    else:
        fits.append(REGISTERS_PER_SM // (round_up(facts.registers * 32, REGISTERS_PER_WARP_STEP) * facts.warps))
    shared = facts.shared_bytes + limits.shared_reserved
    fits += [limits.shared_per_sm // shared] if shared else []
    fits += [TENSOR_MEMORY_COLUMNS // facts.tensor_memory] if facts.tensor_memory else []
    return min(fits)


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def expected_mma(facts: Facts, target: str) -> tuple[tuple[str, ...], str]:
    """(the tensor-core instructions that will do, why others than the target's own will).

    HGMMA and UTC*MMA take 64 rows or more and whole groups of four warps; HMMA serves a kernel with a smaller dot.
    """
    own = LIMITS[target].mma
    if own in ("HMMA", "MFMA"):
        return (own,), ""
    small = [rows for rows in facts.dot_rows if rows < MINIMUM_ROWS]
    if facts.warps % 4:
        return ("HMMA",), f"HMMA: {facts.warps} warps are no whole group of four"
    if small and len(small) == len(facts.dot_rows):
        return ("HMMA",), f"HMMA: a dot of {min(small)} rows, {own} takes {MINIMUM_ROWS}"
    if small:
        return (own, "HMMA"), f"HMMA too: a dot of {min(small)} rows, {own} takes {MINIMUM_ROWS}"
    return (own,), ""


def violations(facts: Facts, case: Case, target: str) -> list[str]:
    found = [*memory_violations(facts, case, target)]
    if case.dots:
        found += dot_violations(facts, target)
        if facts.macs > facts.macs_needed and not case.bound_by_memory:
            found.append(f"tensor cores do {facts.macs / facts.macs_needed:.2f} × what is needed: warps repeat each other")
    elif case.dtype == "fp32":
        found += [f"{facts.mma[name]} {name} in an fp32 kernel: not IEEE arithmetic" for name in facts.mma if name != "FP32"]
    return found


def memory_violations(facts: Facts, case: Case, target: str) -> list[str]:
    limits, found = LIMITS[target], []
    if target.startswith("gfx") and facts.spills:
        found.append(f"{facts.spills} spilled VGPRs")
    elif case.dots and facts.spills_in_mma_loops:
        found.append(f"{facts.spills_in_mma_loops} spill instructions in tensor-core loops")
    elif not case.dots and facts.spills_in_loops:
        found.append(f"{facts.spills_in_loops} spill instructions in loops")
    if facts.shared_bytes > limits.shared_per_block:
        found.append(f"{facts.shared_bytes} bytes of shared memory, a block may have {limits.shared_per_block}")
    elif not blocks_per_sm(facts, target):
        found.append(f"no block fits: {facts.registers} registers × {facts.warps} warps, {facts.shared_bytes} B shared")
    return found


def dot_violations(facts: Facts, target: str) -> list[str]:
    wanted, _ = expected_mma(facts, target)
    found = [f"no {name}: a dot misses the tensor cores" for name in wanted if not facts.mma[name]]
    found += [f"a dot of {operand} operands: it misses the bf16 and fp16 tensor cores" for operand in facts.wide_dots]
    others = [name for name in facts.mma if name not in wanted]
    found += [f"{name} where {'/'.join(wanted)} is due" for name in others]
    if target.startswith("sm_") and not facts.async_copies:
        found.append("no asynchronous copies (LDGSTS, UTMALDG): loads are not pipelined")
    return found


def audit_row(kernel: CompiledKernel, case: Case, target: str) -> dict[str, Any]:
    """The row of the audit's table: what the case is, what was read, and whether it may pass."""
    facts = facts_of(kernel, target, case.useful)
    reasons = violations(facts, case, target)
    return {
        **case_row(case, target),
        **fact_row(facts),
        "blocks_per_sm": blocks_per_sm(facts, target),
        "note": expected_mma(facts, target)[1] if case.dots else "",
        "reasons": reasons,
        "ok": not reasons,
    }


def fact_row(facts: Facts) -> dict[str, Any]:
    return {
        "registers": facts.registers,
        "spills": facts.spills,
        "spills_in_loops": facts.spills_in_loops,
        "spills_in_mma_loops": facts.spills_in_mma_loops,
        "shared_bytes": facts.shared_bytes,
        "tensor_memory_columns": facts.tensor_memory,
        "warps": facts.warps,
        "mma": "+".join(sorted(facts.mma)),
        "mma_instructions": sum(facts.mma.values()),
        "mma_ratio": round(facts.macs / facts.macs_needed, 3) if facts.macs_needed else None,
        "roofs": list(facts.roofs),
        "async_copies": facts.async_copies,
        "instructions": facts.instructions,
    }


def failed_row(case: Case, target: str, reason: str) -> dict[str, Any]:
    """The row of a case that gave no machine code."""
    nothing = Facts(0, 0, 0, 0, 0, 0, case.num_warps, 0, 0)
    return {
        **case_row(case, target),
        **fact_row(nothing),
        "blocks_per_sm": 0,
        "note": "",
        "reasons": [reason],
        "ok": False,
    }


def case_row(case: Case, target: str) -> dict[str, Any]:
    plain = (int, float, bool, str, type(None))
    return {
        "kernel": case.name,
        "target": target,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "stages": case.num_stages,
        "options": dict(case.options),
        "constants": {name: x if isinstance(x, plain) else str(x) for name, x in case.constants.items()},
    }
