"""The backends of ``infused_attention`` on a GPU, held to the contract of all backends. Not run on a GPU yet."""

import importlib.util

import pytest
import torch
from attention_cases import CASES, GATES, Case, assert_backend_right, assert_right, frozen, make, run, some, upstream_of
from mitrain_kernels.infused_attention import infused_attention

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = [Case(gate, d=64, tk=700, H=6, G=2, padding=side) for gate in GATES for side in (None, "left")] + [
    Case("prefix", d=128, tk=1030, tq=130, window=200),
    Case("prefix", d=128, tk=700, H=6, G=2),
    Case("prefix", d=256, tk=300),
    Case("token", d=128, tk=300, k_add=True),
    Case("sequence", d=64, lengths=(300, 0, 1, 513)),
]


def bent(case):
    return case.k_add and case.softcap is not None and case.gate != "token"


def assert_gpu_right(case, backend, dtype):
    if backend in ("triton", "flex", "flash") and bent(case):
        return
    assert_backend_right(case, backend, dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "sdpa", "auto"])
@some(CASES + LARGE)
def test_output_and_gradients(case, backend, dtype):
    if backend == "triton" and dtype == torch.float32 and case.d > 128:
        return
    assert_gpu_right(case, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@some([case for case in CASES + LARGE if case.d >= 16 or case.d == 8])
def test_flex(case, dtype):
    if case.lengths is None or case.gate != "token":
        assert_gpu_right(case, "flex", dtype)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@some([case for case in CASES + LARGE if case.d % 8 == 0 and not (case.padding and case.window)])
def test_flash(case, dtype):
    if case.padding is None and (case.lengths is None or case.gate != "token"):
        assert_gpu_right(case, "flash", dtype)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "token"])
def test_decoding(gate, backend):
    for case in (Case(gate, tq=1, tk=900, H=8, G=2, d=64, padding="all"), Case(gate, tq=1, tk=70, window=9, d=128)):
        inputs, options = make(case, torch.bfloat16, device="cuda")
        inputs = frozen(inputs, *inputs)
        got = {"output": infused_attention(**inputs, **options, backend=backend)}
        assert_right(got, inputs, upstream_of(inputs), **options)


def test_two_runs_are_equal():
    inputs, options = make(Case(d=64, tk=700, padding="left"), torch.bfloat16, device="cuda")
    first, again = (run(infused_attention, inputs, upstream_of(inputs), backend="triton", **options) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_addresses_beyond_two_to_the_31():
    tokens = 2**31 // (64 * 128) + 40
    k = torch.randn(1, 64, tokens, 128, dtype=torch.bfloat16, device="cuda")
    inputs = make(Case(B=1, H=64, G=64, M=1, d=128, tk=8), torch.bfloat16, device="cuda")[0]
    whole = frozen(inputs, *inputs) | {"k": k, "v": k}
    late = {n: x[:, 60:] if n in ("q", "k", "v") else x[:, :, 60:] for n, x in whole.items() if n != "head_logit"}
    got = infused_attention(**whole, backend="triton")[:, 60:]
    expected = infused_attention(**late, head_logit=whole["head_logit"][:, 60:], backend="triton")
    assert torch.equal(got, expected)
