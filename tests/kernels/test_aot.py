"""The audit of machine code: what it must catch, on kernels made to fail, and what it must let pass, on our own.

Compiles about twenty small cases the first time; the rows are kept in the user's cache.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import bad_kernels
import pytest
import triton
from bench.machine_code import aot, audit, audit_runs, sass
from bench.machine_code.compilation import Case, interpreted, portable, resolved

pytestmark = pytest.mark.skipif(interpreted(), reason="interpreted kernels do not compile")


def product(rows, columns, depth, precision="none", dtype="bf16", warps=4, stages=3, dots=True):
    pointers = dict.fromkeys("ABC", f"*{dtype}")
    constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "PRECISION": precision}
    signature = {**pointers, "M": "i32", "N": "i32", "K": "i32"}
    kernel, aligned = bad_kernels.product, ("N", "K")
    return Case("product", kernel, signature, constants, warps, stages, 0, dtype, aligned, dots)


def elementwise(**changes):
    signature = {**dict.fromkeys("ABC", "*bf16"), "K": "i32"}
    kernel, constants = bad_kernels.elementwise_product, {"ROWS": 64, "COLUMNS": 64}
    return replace(Case("elementwise", kernel, signature, constants, 4, 3, 0, "bf16"), **changes)


CASES = {
    "good": (product(64, 64, 32), "sm_80"),
    "narrow": (product(16, 64, 64), "sm_90"),
    "spills": (product(128, 256, 64, stages=2), "sm_80"),
    "too much shared memory": (product(128, 128, 64, warps=8, stages=9), "sm_90"),
    "off the tensor cores": (elementwise(), "sm_90"),
    "fp32 dot": (product(64, 64, 32, "ieee"), "sm_80"),
    "tf32": (product(64, 64, 32, "tf32", "fp32", dots=False), "sm_90"),
    "not pipelined": (product(64, 64, 32, stages=1), "sm_80"),
    "spills without a dot": (elementwise(dots=False, options={"maxnreg": 24}), "sm_80"),
}


@pytest.fixture(scope="module")
def rows():
    """A row for each of ``CASES``."""
    return dict(zip(CASES, audit_runs.audit_all(list(CASES.values()), jobs=1), strict=True))


def only_reason(row):
    assert not row["ok"]
    (reason,) = row["reasons"]
    return reason


def test_a_good_kernel_passes(rows):
    row = rows["good"]
    assert row["ok"] and row["reasons"] == [] and row["note"] == ""
    assert row["mma"] == "HMMA" and row["mma_instructions"] > 0 and row["async_copies"] > 0
    assert row["spills"] == row["spills_in_mma_loops"] == 0 and row["blocks_per_sm"] >= 1
    assert row["shared_bytes"] == 2 * 2 * (64 * 32 + 32 * 64)  # two stages in flight of two bf16 tiles


def test_a_small_dot_may_take_the_older_tensor_core_instruction_and_says_so(rows):
    assert rows["narrow"]["ok"] and rows["narrow"]["mma"] == "HMMA"
    assert "a dot of 16 rows" in rows["narrow"]["note"]


def test_spills_in_a_tensor_core_loop_are_caught(rows):
    assert rows["spills"]["spills_in_mma_loops"] > 100
    assert only_reason(rows["spills"]) == f"{rows['spills']['spills_in_mma_loops']} spill instructions in tensor-core loops"


def test_too_much_shared_memory_is_caught(rows):
    assert rows["too much shared memory"]["shared_bytes"] > 232448
    assert only_reason(rows["too much shared memory"]).endswith("bytes of shared memory, a block may have 232448")


def test_kernels_that_miss_the_tensor_cores_are_caught(rows):
    assert rows["off the tensor cores"]["mma_instructions"] == rows["fp32 dot"]["mma_instructions"] == 0
    assert "no HGMMA: a dot misses the tensor cores" in rows["off the tensor cores"]["reasons"]
    assert "no HMMA: a dot misses the tensor cores" in rows["fp32 dot"]["reasons"]
    assert any("a dot of f32 operands" in reason for reason in rows["fp32 dot"]["reasons"])


def test_tensor_cores_below_fp32_are_caught(rows):
    assert rows["tf32"]["mma"] == "TF32"
    assert only_reason(rows["tf32"]).endswith("TF32 in an fp32 kernel: not IEEE arithmetic")


def test_loads_that_are_not_pipelined_are_caught(rows):
    assert only_reason(rows["not pipelined"]).startswith("no asynchronous copies")


def test_spills_are_caught_in_any_loop_of_a_kernel_without_a_dot(rows):
    row = rows["spills without a dot"]
    assert row["spills_in_mma_loops"] == 0 and 0 < row["spills_in_loops"] < row["spills"]
    assert only_reason(row) == f"{row['spills_in_loops']} spill instructions in loops"


def facts(**changes):
    values = {"registers": 128, "spills": 0, "spills_in_loops": 0, "spills_in_mma_loops": 0, "shared_bytes": 32768}
    values |= {"tensor_memory": 0, "warps": 4, "instructions": 100, "async_copies": 4}
    return audit.Facts(**(values | changes))


def test_occupancy_by_hand():
    assert audit.blocks_per_sm(facts(), "sm_80") == 4  # registers: 65536 / (128 · 32 · 4); shared: 164 K / 33 K = 4
    assert audit.blocks_per_sm(facts(registers=129), "sm_80") == 3  # 129 · 32 rounds up to 17 · 256
    assert audit.blocks_per_sm(facts(shared_bytes=0, registers=16, warps=1), "sm_80") == 32
    assert audit.blocks_per_sm(facts(registers=255, warps=16), "sm_90") == 0
    assert audit.blocks_per_sm(facts(tensor_memory=256), "sm_100") == 2
    assert audit.blocks_per_sm(facts(registers=132), "gfx942") == 2  # waves: 512 / 136 = 3 per SIMD; LDS: 64 K / 32 K
    assert audit.blocks_per_sm(facts(registers=264, shared_bytes=0), "gfx942") == 1


def test_rules_that_the_compiler_does_not_break_on_demand():
    case = product(64, 64, 32)
    assert audit.violations(facts(spills=3), case, "gfx942")[0] == "3 spilled VGPRs"
    assert audit.violations(facts(registers=255, warps=16), elementwise(dots=False), "sm_90")[0].startswith("no block fits")
    two_dots = facts(dot_rows=(64, 16), mma=Counter(HMMA=8))
    assert audit.dot_violations(two_dots, "sm_90") == ["no HGMMA: a dot misses the tensor cores"]
    assert audit.dot_violations(facts(dot_rows=(64,), mma=Counter(HGMMA=1, HMMA=8)), "sm_90") == ["HMMA where HGMMA is due"]


def test_families_of_tensor_core_instructions():
    names = {"v_mfma_f32_32x32x8_bf16": "MFMA", "v_mfma_f32_32x32x8_bf16_1k": "MFMA", "v_mfma_f32_32x32x8f16": "MFMA"}
    names |= {"v_mfma_f32_32x32x2f32": "FP32", "v_mfma_f32_32x32x2_f32": "FP32", "v_mfma_f32_32x32x4_xf32": "TF32"}
    assert {name: audit.amd_family(name) for name in names} == names
    texts = {"HMMA.16816.F32.BF16 R4, R8, R12, R4": "HMMA", "HMMA.1688.F32.TF32 R4, R8, R12, R4": "TF32"}
    texts |= {"UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR17], tmem[UR10], idesc[UR11], !UPT": "UTC*MMA"}
    assert {text: audit.nvidia_family(sass.parse("0", text)) for text in texts} == texts


def test_a_second_run_reads_the_same_rows_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path))
    compiled = []
    work = [CASES["good"]]
    first = audit_runs.audit_all(work, 1, progress=lambda left, row: compiled.append(left))
    assert audit_runs.audit_all(work, 1, progress=lambda left, row: compiled.append(left)) == first and compiled == [0]
    assert [path.suffix for path in (tmp_path / "aot").iterdir()] == [".json"]
    (entry,) = (tmp_path / "aot").iterdir()
    entry.write_text("{torn")
    assert audit_runs.audit_all(work, 1)[0]["registers"] == first[0]["registers"]


def test_a_row_is_kept_under_all_that_it_depends_on():
    case, target = CASES["good"]
    changed = [replace(case, num_warps=8), replace(case, aligned=()), replace(case, options={"maxnreg": 64})]
    changed += [
        replace(case, constants={**case.constants, "DEPTH": 64}),
        replace(case, kernel=bad_kernels.elementwise_product),
    ]
    keys = {audit_runs.key_of(*item) for item in [(case, target), (case, "sm_90"), *((x, target) for x in changed)]}
    assert len(keys) == 7


def test_a_case_that_does_not_compile_is_a_violation_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path))
    (row,) = audit_runs.audit_all([(product(64, 64, 7), "sm_80")], 1)
    assert only_reason(row).startswith("does not compile: CompilationError") and not (tmp_path / "aot").exists()
    assert row.keys() - {"seconds"} == audit.failed_row(*CASES["good"], "").keys()


def test_a_case_goes_to_another_process_by_name():
    case, _ = CASES["good"]
    assert portable(case).kernel == "bad_kernels:product" and resolved(portable(case)) == case


EXCERPT = """
\t\tFunction : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x000fe40000000f00 */
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0030*/                   STL [R1+0x4], R3 ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR20], R10 ;
        /*0060*/              @!P4 BRA 0xe0 ;
        /*0070*/               @P0 BRA 0x40 ;
        /*0080*/                   LDL.LU R3, [R1+0x4] ;
        /*0090*/                   ISETP.GE.AND P1, PT, R4, c[0x0][0x160], PT ;
        /*00a0*/              @!P1 CALL.REL.NOINC 0xc0 ;
        /*00b0*/                   BRA 0x20 ;
        /*00c0*/                   LDL R2, [R1] ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR20], R10 ;
        /*00f0*/              @!P4 BRA 0xe0 ;
        /*0100*/                   LDL R5, [R1+0x8] ;
        /*0110*/                   BRA 0x70 ;
        /*0120*/                   BRA 0x120;
"""


def addresses(loops):
    return sorted([hex(x.address) for x in loop] for loop in loops)


def test_what_may_follow_an_instruction():
    ends = ["BRA 0x10", "EXIT", "RET.REL.NODEC R2 0x0"]
    continues = ["@P0 BRA 0x10", "BRA.U UP0, 0x10", "BRA.DIV UR4, 0x10", "@!P1 EXIT", "CALL.REL.NOINC 0x10", "NOP"]
    assert [text for text in (*ends, *continues) if sass.parse("0", text).falls_through] == continues
    assert sass.parse("0", "BRA.U !UP0, 0x1a0").goal == 0x1A0 and sass.parse("0", "IADD3 R4, R4, 0x1").goal is None


def test_loops_of_a_listing_by_hand():
    """Two nested loops around a dot; its wait lies out of line, behind the end: its way back is no loop."""
    inner = ["0x40", "0x50", "0x60", "0x70", "0xe0", "0xf0", "0x100", "0x110"]
    outer = ["0x20", "0x30", *inner[:4], "0x80", "0x90", "0xa0", "0xb0", *inner[4:]]
    assert addresses(sass.tensor_core_loops(EXCERPT)) == [inner]
    assert addresses(sass.loops(EXCERPT)) == sorted([["0x120"], inner, outer, ["0xe0", "0xf0"]])
    assert audit.spills_in(sass.tensor_core_loops(EXCERPT)) == 1  # the reload out of line, at 0x100
    assert audit.spills_in(sass.loops(EXCERPT)) == 3  # and two in the outer loop; those at 0x10 and 0xc0 are in none


WAYS_BACK = """
        /*0000*/                   NOP ;
        /*0010*/                   HMMA.16816.F32 R8, R12, R16, R8 ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   STL [R1], R2 ;
        /*0040*/                   CALL.REL.NOINC 0x90 ;
        /*0050*/                   BRA.U UP0, 0x10 ;
        /*0060*/                   LDL R2, [R1] ;
        /*0070*/               @P1 CALL.REL.NOINC 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   RET.REL.NODEC R2 0x0 ;
        /*00a0*/                   BRA 0x30 ;
"""


def test_several_ways_back_are_one_loop_and_functions_are_apart():
    """No known way leads to the last jump: the loop it enters stays a loop, and counts it in to be safe."""
    listing = f"\t\tFunction : one{WAYS_BACK}\t\tFunction : two{WAYS_BACK}"
    assert addresses(sass.tensor_core_loops(listing)) == [[hex(16 * i) for i in (*range(1, 8), 10)]] * 2
    assert audit.spills_in(sass.tensor_core_loops(listing)) == 4


def test_quick_takes_every_kernel_once_ops_in_turn_dots_first_and_near_width_128():
    case = product(64, 64, 32)
    listed = [replace(case, name="plain", dots=False), *(replace(case, head_dim=d) for d in (32, 256, 128, 64))]
    listed += [replace(case, name=f"k{i}", head_dim=64) for i in range(9)]
    module = type("Op", (), {"audit_cases": staticmethod(lambda target: listed)})
    other = type("Op", (), {"audit_cases": staticmethod(lambda target: [replace(case, name="other")])})
    chosen = aot.cases([module, other], "sm_80", quick=True)
    names = [(x.name, x.head_dim) for x in chosen]
    assert names == [("product", 128), ("other", 0), ("k0", 64), ("k1", 64), ("k2", 64)]
    assert len(chosen) == aot.QUICK["sm_80"] and sum(aot.QUICK.values()) <= 16
    assert len(aot.cases([module], "sm_100", quick=True)) == 1 and len(aot.cases([module], "sm_80", quick=False)) == 14


def test_the_whole_table_is_not_more_than_24_compilations_for_each_target():
    modules = [aot.importlib.import_module(module) for module in aot.OPS.values()]
    assert all(len(aot.cases(modules, target, quick=False)) <= 24 for target in aot.QUICK)


def test_our_kernels_pass(capsys):
    assert aot.main(["--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["target"] for row in rows} == set(aot.QUICK) and len(rows) <= 16
    for row in rows:
        assert row["ok"] is True and row["spills_in_mma_loops"] == 0 and row["mma_ratio"] in (None, 1.0)
        assert {"kernel", "target", "head_dim", "dtype", "registers", "shared_bytes", "mma_instructions"} <= row.keys()
        assert isinstance(row["registers"], int) and isinstance(row["mma_instructions"], int)


def test_a_violation_is_printed_and_ends_in_exit_code_1(rows, monkeypatch, capsys):
    monkeypatch.setattr(audit_runs, "audit_all", lambda *_, **__: list(rows.values()))
    assert aot.main(["--quick"]) == 1
    text = capsys.readouterr().out
    assert "VIOLATION product sm_80 head_dim 0 bf16: no asynchronous copies" in text
    assert text.rstrip().endswith(f"{len(rows)} compilations, {len(rows) - 2} with a violation")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--targets", "sm_80,sm_75"], "unknown target sm_75: choose from sm_80, sm_86, sm_90, sm_100, gfx942"),
        (["--targets", ","], "unknown target ','"),
        (["--op", "other"], "invalid choice: 'other'"),
        (["--jobs", "0"], "--jobs 0: at least one process is needed"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, sentence, capsys):
    assert aot.main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_the_interpreter_and_missing_tools_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(triton.knobs.NvidiaTool, "from_path", staticmethod(lambda path: None))
    assert aot.main(["--targets", "sm_80"]) == 2 and "triton's ptxas is missing" in capsys.readouterr().err
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    assert aot.main([]) == 2 and "triton is not installed" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2 and "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_the_roofline_needs_neither_triton_nor_torch():
    code = (
        "import sys; sys.modules['triton'] = sys.modules['torch'] = None\n"
        "from bench.machine_code.aot import main; sys.exit(main(['--roofline']))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "infused_attention_forward" in done.stdout and done.stderr == ""
