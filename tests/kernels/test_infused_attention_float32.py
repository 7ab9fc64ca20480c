"""The backend ``sdpa`` in float32, the type that is trained in on a CPU: the contract where numbers are hard."""

import pytest
import torch
from attention_cases import (
    CASES,
    Case,
    assert_backend_right,
    assert_right,
    faint,
    largest,
    make,
    poisoned,  # noqa: F401
    run,
    some,
    truth,
    upstream_of,
)
from mitrain_kernels.infused_attention import infused_attention

OWN = [case for case in CASES if case.gate in ("prefix", "sequence") and case.M and case.softcap is None]


@some([Case(), Case("sequence", padding="left"), Case("token")])
def test_the_root_adds_epsilon_squared(case):
    inputs, options = faint(case)
    got = run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), **options)
    other = truth(inputs, upstream_of(inputs), **options, eps=1e-3)  # its square is ε
    assert largest(got["v"] - other["v"]) > 0.1 * largest(other["v"])


@some(OWN)
def test_the_contract_in_float32(case, poisoned):  # noqa: F811
    assert_backend_right(case, "sdpa", torch.float32)


@pytest.mark.parametrize("d", [16, 64, 128, 200])
@some([Case(tk=70, H=6, padding="left"), Case("sequence", tk=70, tq=40, M=1, G=4)])
def test_head_widths(case, d):
    assert_backend_right(Case(**{**vars(case), "d": d}), "sdpa", torch.float32)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_ones_own(dtype, samples):
    """It says what key_padding and causal say, so that the definition knows it too."""
    inputs, options = make(Case(padding="left", tq=6), torch.float32)
    if samples == 1:
        options["key_padding"][:] = options["key_padding"][:1]
    i, j = torch.arange(3, 9)[:, None], torch.arange(9)
    mask = (options["key_padding"][:samples, None, None] & (j <= i)).expand(samples, 1, 6, 9)
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    got = run(infused_attention, inputs, upstream_of(inputs), **options, mask=mask, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), **options)


@pytest.mark.parametrize("spread", [1, 8, 130])
def test_weights_of_all_sizes_down_to_none(spread):
    """Scores are whole numbers down to -spread, exact in float32: what remains is the error of the exponential, and that
    of differences of weighted keys, which grows with the keys' size."""
    inputs, options = make(Case(tk=40, scale=1.0), torch.float32)
    inputs = {n: x.detach() for n, x in inputs.items()}
    inputs["q"], inputs["k_mul"] = torch.eye(8)[0].expand(2, 4, 40, 8).clone(), torch.zeros(2, 2, 4, 8)
    inputs["k"] = -torch.randint(0, spread + 1, (2, 2, 40, 8), generator=torch.Generator().manual_seed(1)).float()
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    got = run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), slack=max(1, spread // 8), **options)


@pytest.mark.parametrize("place", [0, 3, 18])
def test_a_score_that_outdoes_all_others_wherever_it_stands(place):
    """130 above the rest, whose exponential float32 does not hold: the highest is found among 20 keys, which are no
    multiple of a vector's lanes."""
    inputs, options = make(Case(tk=20, scale=1.0), torch.float32)
    inputs = {n: x.detach() for n, x in inputs.items()}
    inputs["q"], inputs["k_mul"] = torch.eye(8)[0].expand(2, 4, 20, 8).clone(), torch.zeros(2, 2, 4, 8)
    inputs["k"] = torch.zeros(2, 2, 20, 8)
    inputs["k"][:, :, place, 0] = 130
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    got = run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), slack=16, **options)


def test_keys_with_strides_that_matrix_products_refuse():
    inputs, options = make(Case(tk=9), torch.float32)
    same = {n: inputs[n].detach()[:, :, :1].expand(-1, -1, 9, -1).requires_grad_() for n in "kv"}
    single, _ = make(Case(tk=1), torch.float32, seed=3)
    odd = {n: single[n].detach().as_strided((2, 2, 1, 8), (16, 8, 1, 1)).requires_grad_() for n in "kv"}
    for own in (inputs | same, single | odd):
        got = run(infused_attention, own, upstream_of(own), **options, backend="sdpa")
        assert_right(got, own, upstream_of(own), **options)


@pytest.mark.parametrize("frozen", ["q", "k", "v", "kv", "qkv"])
def test_gradients_that_nobody_asked_for(frozen):
    inputs, options = make(Case(tq=5), torch.float32)
    inputs = {n: x.detach() if n in frozen else x for n, x in inputs.items()}
    assert_right(run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa"),
                 inputs, upstream_of(inputs), **options)  # fmt: skip


def test_what_is_not_seen_may_be_nan():
    """Values that padding hides do not reach the gate's sums; NaN that is seen reaches the output."""
    inputs, options = make(Case(padding="left"), torch.float32)
    inputs = {n: x.detach() for n, x in inputs.items()}
    clean = infused_attention(**inputs, **options, return_state=True, backend="sdpa")[1]
    inputs["v"][0, :, :2] = float("nan")
    output, state = infused_attention(**inputs, **options, return_state=True, backend="sdpa")
    assert all(torch.equal(x, y) for x, y in zip(clean, state, strict=True))
    inputs["q"][1, 2, 8, 3] = float("nan")
    output = infused_attention(**inputs, **options, backend="sdpa")
    assert output[1, 2, 8].isnan().all() and output[1, 2, :8].isfinite().all()
