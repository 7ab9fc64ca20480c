"""Multiply-adds done and needed, and the roofs of a loop, against figures worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import bad_kernels
import pytest
import torch
from bench.machine_code import audit, audit_runs, expectation, mma, pipes, sass, tiles
from bench.machine_code.compilation import Case, interpreted
from mitrain_kernels.infused_attention import triton_launch

TTIR = """
  %s = tt.dot %q, %k, %zero : tensor<128x128xbf16> * tensor<128x64xbf16> -> tensor<128x64xf32> loc(#loc3)
  %o = tt.dot %p, %v, %acc, inputPrecision = ieee : tensor<128x64xbf16> * tensor<64x128xbf16> -> tensor<128x128xf32>
  %w = tt.dot %a, %b, %c : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>
"""
DOTS = 2 * 128 * 128 * 64


def parsed(*texts):
    return [sass.parse("0", text) for text in texts]


def test_needed_work_is_that_of_the_dots_of_16_bit_operands():
    assert mma.dots(TTIR) == [(128, 128, 64), (128, 64, 128)] and mma.needed(TTIR) == DOTS


def test_work_of_each_family_of_instructions():
    hmma, hgmma, tf32, utc = parsed(
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "HMMA.1688.F32.TF32 R4, R8, R12, R4",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR17], tmem[UR10], idesc[UR11], !UPT",
    )
    assert mma.done([hmma, hmma], 8, "") == 2 * 8 * 16 * 8 * 16
    assert mma.done([hgmma], 8, "") == 2 * 64 * 128 * 16  # two groups of four warps
    assert mma.done([tf32], 8, "") == 0
    assert mma.done([utc] * 12, 8, TTIR) == pytest.approx(DOTS)  # 8 of depth 16 for q·k, 4 for p·v
    text = "\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1]\n\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], 0\n"
    assert mma.done_by_waves(text, 4) == 4 * (32 * 32 * 8 + 16 * 16 * 16)
    assert mma.done_by_waves("\tv_mfma_f32_32x32x2_f32 a[0:15], v0, v1, a[0:15]\n", 4) == 0


LOOP = (
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "LDSM.16.M88.4 R8, [R20]",
    "LDSM.16.MT88.2 R12, [R20+0x100]",
    "LDS.64 R2, [R3]",
    "STS [R3], R2",
    "LDGSTS.E.BYPASS.128 [R3], [R6.64]",
    "MUFU.EX2 R1, R2",
    "FFMA R1, R2, R3, R4",
    "@!P0 FSEL R1, R2, RZ, P1",
    "BRA 0x0",
)


def test_clocks_of_each_pipe_by_hand():
    found = pipes.clocks(parsed(*LOOP), warps=4, macs=4 * 2048, target="sm_80")
    assert found == {
        "tensor": 4 * 2048 / 1024,
        "operands": 4 * (512 + 256) / 128,
        "issued": 10,
        "shared": 4 * (512 + 256 + 32 * 8 + 32 * 4 + 32 * 16) / 128,
        "exp2": 4 * 32 / 16,
        "fp32": 4 * 32 / 64,
        "integer": 4 * 32 / 64,
    }
    assert pipes.roofs(found, 4 * 2048, "sm_80") == (33.3, 15.4, 15.4)  # 8 clocks of 24, of 52
    less = found | {"operands": 4, "shared": 6}
    assert pipes.roofs(less, 4 * 2048, "sm_80") == (80.0, 80.0, 44.4)  # of 10, of 8 + 10


def test_loops_with_other_dots_add_up_and_repeated_dots_count_as_lost(monkeypatch):
    """Loops of 1 and 2 HMMA: clocks of the shortest of each, 8 and 16 on the tensor cores; 2 of 3 dots are useful."""
    hmma, other = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "IADD3 R1, R2, R3, RZ"
    one, two = parsed(hmma), parsed(hmma, hmma)
    monkeypatch.setattr(audit.sass, "tensor_core_loops", lambda _: [one, two, two + parsed(*[other] * 90)])
    kernel = SimpleNamespace(metadata=SimpleNamespace(num_warps=4), asm={"ttir": ""})
    monkeypatch.setattr(mma, "needed", lambda _: 5 * 4 * 2048)
    assert audit.loop_facts(kernel, "", "sm_80", 1.0) == {"macs": 5 * 4 * 2048, "roofs": (100.0, 100.0, 88.9)}
    assert audit.loop_facts(kernel, "", "sm_80", 2 / 3)["roofs"] == (66.7, 66.7, 59.3)


def test_hgmma_reads_its_operands_from_shared_memory_and_hmma_has_half_its_rate():
    both, one = parsed("HGMMA.64x64x16.F32 R4, gdesc[UR8], R4", "HGMMA.64x64x16.F32 R4, R8, gdesc[UR8].tnspB, R4")
    macs = 64 * 64 * 16
    assert pipes.clocks([both], 4, macs, "sm_90")["operands"] == 2 * 16 * (64 + 64) / 128
    assert pipes.clocks([one], 4, macs, "sm_90")["operands"] == 2 * 16 * 64 / 128
    assert pipes.clocks([one], 4, macs, "sm_90")["tensor"] == 32
    assert pipes.clocks(parsed(LOOP[0]), 4, 4 * 2048, "sm_90")["tensor"] == 8


@pytest.mark.skipif(interpreted(), reason="interpreted kernels do not compile")
def test_warps_that_repeat_each_other_are_caught():
    """A dot of 16 × 16 is two HMMAs of 16 × 8: of eight warps each two do one, and six repeat them."""
    constants = {"ROWS": 16, "COLUMNS": 16, "DEPTH": 64, "PRECISION": "none"}
    signature = {**dict.fromkeys("ABC", "*bf16"), "M": "i32", "N": "i32", "K": "i32"}
    case = Case("product", bad_kernels.product, signature, constants, 8, 3, 0, "bf16", ("N", "K"))
    (row,) = audit_runs.audit_all([(case, "sm_80")], 1)
    assert row["mma_ratio"] == 4.0
    assert row["reasons"] == ["tensor cores do 4.00 × what is needed: warps repeat each other"]
    (row,) = audit_runs.audit_all([(replace(case, bound_by_memory=True), "sm_80")], 1)
    assert row["mma_ratio"] == 4.0 and row["ok"]


ROOFS = {"forward": [100.0, 90.0, 60.0], "query": [90.0, 60.0, 30.0], "key": [90.0, 80.0, 40.0]}


def row(target, width, name):
    kernel = f"infused_attention_{name}"
    return {"target": target, "head_dim": width, "kernel": kernel, "roofs": ROOFS[name], "ok": True}


def test_expectation_by_hand():
    """Backward 7 dots are done for 5 that are needed: 5 / (3 / .6 + 4 / .8) = .5, and 5 / (3 / .3 + 4 / .4) = .25."""
    rows = [row("sm_90", width, name) for width in expectation.WIDTHS for name in ROOFS]
    first = expectation.shares(rows)[0]
    assert first["passes"] == {"forward": [60.0, 90.0], "backward": [pytest.approx(25.0), pytest.approx(50.0)]}
    line = expectation.table(rows).splitlines()[2]
    assert line.startswith("| sm_90 | 64 | 100 / 90 / 60 | 90 / 60 / 30 | 90 / 80 / 40 | 60–90 | 25–50 |")
    assert line.endswith("| 0.80–1.00 × FlashAttention-3 on an H100 |")  # 60 and 90 beside 75


def test_candidates_of_the_search_let_no_warp_repeat_another_and_fit():
    for kernel, width, _ in tiles.ENTRIES:
        found = tiles.candidates("sm_80", kernel, width)
        assert 0 < len(found) <= tiles.TRIED
        assert all(t.own >= 16 * t.warps or t.step >= 8 * t.warps for t in found)
        assert all(8 * t.step * t.stages // 2 * width <= 166912 for t in found)
        assert all(t.nonkdim == 16 for t in tiles.candidates("gfx942", kernel, width))


def test_the_best_tile_passes_first_of_all_then_has_the_highest_wide_roof():
    constants = {"BM": 64, "BN": 64}
    base = row("sm_80", 64, "forward") | {"constants": constants, "instructions": 9, "blocks_per_sm": 1}
    spills, slow = base | {"ok": False}, base | {"roofs": [100.0, 80.0, 70.0]}
    assert tiles.best([spills, slow, base], shown=2) == [base, slow]


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        *(((8, 0), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100")),
        *((smaller, "sm_86") for smaller in ((7, 5), (8, 6), (8, 9), (12, 0))),
    ],
)
def test_a_gpu_takes_tiles_that_fit_its_shared_memory_and_that_it_has_the_instructions_for(capability, target, monkeypatch):
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton_launch.target_of(torch.device("cuda")) == target


def test_options_of_the_compiler_are_those_of_the_target():
    chosen = {t: triton_launch.tile_for(t, "key", 128, torch.bfloat16, False).options for t in triton_launch.TILES}
    assert chosen.pop("gfx942") == {"matrix_instr_nonkdim": 16} and not any(chosen.values())
