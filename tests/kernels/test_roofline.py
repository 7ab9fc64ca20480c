"""The bytes-and-FLOPs model against figures worked out by hand."""

import pytest
from bench.machine_code import roofline
from bench.machine_code.roofline import GPUS, Cost, Shape

# Three queries at the end of five keys: they see 3, 4 and 5 of them, 12 pairs per head.
SMALL = Shape(B=2, H=4, G=2, T=3, S=5, d=8, M=3)


def test_pairs_that_a_causal_mask_shows():
    assert SMALL.pairs == 3 + 4 + 5
    assert Shape(B=1, H=1, G=1, T=512, S=512, d=64).pairs == 512 * 513 // 2
    assert Shape(B=1, H=1, G=1, T=1, S=100, d=64).pairs == 100


def test_attention_by_hand():
    q, k, maps = 2 * 4 * 3 * 8, 2 * 2 * 5 * 8, 3 * 2 * 4 * 8  # elements
    rows = 2 * 4 * 3
    dot = 2 * (2 * 4 * 12) * 8  # FLOPs: 2 per multiply-add, 96 visible pairs, width 8
    assert roofline.forward_cost(SMALL) == Cost(2 * (q + k + k + q + 3 * maps) + 4 * (3 * rows + rows), 2 * dot)
    dq = 2 * (6 * q + 2 * k + 3 * maps + 3 * maps) + 4 * (3 * rows + rows + rows + 3 * rows)
    assert roofline.dq_cost(SMALL) == Cost(dq, 3 * dot)
    assert roofline.dkdv_cost(SMALL) == Cost(2 * (2 * q + 4 * k) + 4 * 2 * rows, 4 * dot)
    sums = 3 * 2 * 4 * 5 + 2 * 2 * 5  # v·v_add per modality, sample, head and key; ‖v‖² per sample, kv head and key
    assert roofline.gate_cost(SMALL) == Cost(2 * (k + maps) + 4 * sums, 2 * 8 * sums, tensor=False)


def test_forward_moves_its_tensors_once_and_else_one_number_per_row():
    shapes = [Shape(B=4, H=32, G=8, T=T, S=T, d=128) for T in (1024, 2048)]
    short, long = (roofline.forward_cost(s).bytes - 2 * (2 * s.queries + 2 * s.keys) for s in shapes)
    assert long - short == 4 * 32 * 1024 * 2 * 4  # a gate and a log-sum-exp, fp32
    assert short == 4 * 32 * 1024 * 2 * 4 + 3 * 4 * 32 * 128 * 2  # and three maps


def test_swiglu_by_hand():
    assert roofline.swiglu_forward_cost(2, 10, 64) == Cost(3 * 2 * 1280 + 4 * 128, 5 * 1280, tensor=False)
    assert roofline.swiglu_backward_cost(2, 10, 64) == Cost(5 * 2 * 1280 + 8 * 128, 15 * 1280, tensor=False)


def test_the_roofline_by_hand():
    a100, h100 = GPUS
    assert (a100.tensor, a100.memory, h100.tensor, h100.memory) == (312e12, 2.039e12, 989.4e12, 3.35e12)
    cost = Cost(bytes=2_039_000, flops=624_000_000)
    assert cost.limits(a100) == pytest.approx((1e-6, 2e-6)) and cost.intensity == pytest.approx(306.03, abs=0.01)
    assert Cost(1, 19_500_000, tensor=False).limits(a100)[1] == pytest.approx(1e-6)


def test_rows_say_what_bounds_a_kernel():
    rows = {(row["kernel"], row["shape"]): row for row in roofline.rows()}
    long = rows["infused_attention_forward", "B4 H32 G8 T2048 d128"]
    assert long["flops"] == 4 * 4 * 32 * 128 * (2048 * 2049 // 2)
    assert long["A100_bound"] == long["H100_bound"] == "compute"
    assert long["H100_us"] == pytest.approx(long["flops"] / 989.4e12 * 1e6, abs=0.01)
    decode = rows["infused_attention_decode", "B4 H32 G8 T1 S8192 d128"]
    assert decode["A100_bound"] == "memory" and decode["flops_per_byte"] == 4.0  # H / G query heads per key and value
    assert decode["A100_us"] == pytest.approx(decode["bytes"] / 2.039e12 * 1e6, abs=0.01)
    assert all(row["A100_bound"] == "memory" for (kernel, _), row in rows.items() if "swiglu" in kernel)


def test_the_table_states_the_limits_and_shows_every_row():
    text = roofline.table(roofline.rows())
    assert "not measured" in text and "A100: 312 TFLOP/s" in text and "3.35 TB/s" in text
    assert len(text.splitlines()) == 4 + len(roofline.rows())
