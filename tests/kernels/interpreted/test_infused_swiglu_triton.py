"""The Triton kernels of ``infused_swiglu`` against the float64 truth: output, every gradient, every way to be called."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mitrain_kernels.infused_swiglu import infused_swiglu, triton_kernel
from mitrain_kernels.infused_swiglu.triton_kernel import Tile
from swiglu_cases import NAMES, PACKED, PADDED, across, assert_backend_right, frozen, make, poison, strided

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_kernel_right(inputs, cu_seqlens=None, **options):
    truncated = inputs["gate"].dtype == torch.bfloat16
    return assert_backend_right(inputs, cu_seqlens, "triton", truncated=truncated, **options)


def test_output_and_gradients(monkeypatch):
    poison(monkeypatch)
    for shape in PADDED:
        assert_kernel_right(make(shape, torch.float32)[0])
    for lengths, width in PACKED:
        assert_kernel_right(*make(width, torch.float32, lengths=lengths))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_is_computed_in_float32(dtype, monkeypatch):
    poison(monkeypatch)
    assert_kernel_right(make((2, 19, 5), dtype)[0])
    assert_kernel_right(*make(5, dtype, lengths=[4, 0, 9]))


@pytest.mark.parametrize("tiles", [(Tile(1, 4, 3, 1), Tile(2, 2, 1, 1)), (Tile(8, 4, 1, 1), Tile(16, 32, 4, 1))])
def test_any_tile(tiles, monkeypatch):
    poison(monkeypatch)
    monkeypatch.setitem(triton_kernel.TILES, "interpreter", tiles)
    assert_kernel_right(make((1, 3, 5), torch.float32)[0])
    assert_kernel_right(*make(5, torch.float32, lengths=[2, 0, 3]))


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
    st.booleans(),
)
def test_any_shape(batch, tokens, width, dtype, seed, packed):
    if packed:
        lengths = torch.randint(0, tokens + 1, (batch,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert_kernel_right(*make(width, dtype, lengths=lengths, seed=seed))
    else:
        assert_kernel_right(make((batch, tokens, width), dtype, seed=seed)[0])


@pytest.mark.parametrize("asked", [NAMES[:1], NAMES[1:2], NAMES[2:], NAMES[:2], NAMES[1:], NAMES[::2]])
def test_only_the_gradients_asked_for_are_computed(asked, monkeypatch):
    poison(monkeypatch)
    computed, backward = [], triton_kernel.backward
    monkeypatch.setattr(triton_kernel, "backward", lambda *args: computed.append(backward(*args)) or computed[-1])
    got = assert_kernel_right(frozen(make((2, 7, 5), torch.float32)[0], *set(NAMES) - set(asked)))
    assert set(got) == {"output", *asked}
    assert [x.numel() > 0 for x in computed[0]] == [name in asked for name in NAMES]


@pytest.mark.parametrize("layout", [strided, across])
def test_inputs_that_are_not_contiguous(layout):
    assert_kernel_right(layout(make((3, 4, 6), torch.float32)[0]))
    inputs, cu_seqlens = make(6, torch.float32, lengths=[2, 3])
    assert_kernel_right(layout(inputs), cu_seqlens)


def test_an_expanded_upstream_gradient():
    inputs, _ = make((3, 4, 6), torch.float32)
    for ones in (torch.ones(()), torch.ones(6), torch.ones(4, 1)):
        assert_kernel_right(inputs, upstream=ones.expand(3, 4, 6))


def test_rows_of_a_wide_view_are_not_copied():
    wide = torch.randn(2, 3, 10)
    assert triton_kernel.token_rows(wide[..., 3:7]).data_ptr() == wide[..., 3:7].data_ptr()


def test_large_activations_stay_finite():
    gate = torch.tensor([-1e30, -1e4, 1e4, 3e4]).view(1, 4, 1).expand(1, 4, 3).requires_grad_()
    f = torch.ones(1, 3, requires_grad=True)
    output = infused_swiglu(gate, torch.ones(1, 4, 3), f, backend="triton")
    assert all(x.isfinite().all() for x in (output, *torch.autograd.grad(output.sum(), (gate, f))))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_compute(shape, monkeypatch):
    poison(monkeypatch)
    inputs, _ = make(shape, torch.float32)
    output = infused_swiglu(**inputs, backend="triton")
    assert output.shape == shape
    (df,) = torch.autograd.grad(output.sum(), inputs["f"])
    assert torch.equal(df, torch.zeros_like(df))


def test_float64_is_refused():
    with pytest.raises(ValueError, match="backend 'triton' does not compute in float64: use backend='torch'"):
        infused_swiglu(**make((2, 3, 4))[0], backend="triton")


def test_shares_cover_long_samples_without_knowing_the_lengths():
    tile = Tile(4, 16, 2, 1)
    assert triton_kernel.shares(torch.empty(3, 17, 5), 3, False, tile) == 3
    assert triton_kernel.shares(torch.empty(64, 5), 1, True, tile) == 8
    assert triton_kernel.shares(torch.empty(800, 5), 100, True, tile) == triton_kernel.UNEVEN
    assert triton_kernel.shares(torch.empty(0, 5), 2, True, tile) == 1
