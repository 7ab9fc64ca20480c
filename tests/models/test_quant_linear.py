"""Frozen low-bit linear layers: their error is the format's, their gradient exact, and nothing is kept for backward."""

import sys
from types import SimpleNamespace

import pytest
import torch
from dequantised import plain_linear
from saved import saved_bytes
from tiny import tiny
from torch import nn
from tracked import Tracked

from mitrain import MiTConfig, attach
from mitrain.core.errors import ConfigError, MissingExtraError, ModelError
from mitrain.models.quant import FrozenInt8Linear, FrozenNF4Linear, formats, kernels, weights

KINDS = [FrozenInt8Linear, FrozenNF4Linear]
SHAPES = [(1, 1), (5, 7), (64, 32), (37, 96), (130, 33)]


def linear(out: int = 40, width: int = 72, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(out * width)
    made = nn.Linear(width, out, bias, dtype=dtype).requires_grad_(False)
    made.weight.mul_(torch.logspace(-3, 2, out, dtype=dtype)[:, None])  # rows of very different sizes
    return made


def rows(n: int = 6, width: int = 72, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, width, dtype=dtype, generator=torch.Generator().manual_seed(n)).requires_grad_()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Matrices of a few thousand weights take several pieces."""
    monkeypatch.setattr(formats, "PIECE", 500)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_off_by_half_a_step_at_most(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    payload, scale = formats.quantise_rows(weight)
    assert payload.dtype == torch.int8 and payload.shape == shape and scale.shape == shape[:1]
    torch.testing.assert_close(scale.double(), weight.abs().amax(1) / 127, rtol=1e-6, atol=0)
    error = (payload.double() * scale.double()[:, None] - weight).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 2e-5)).all()  # 127 roundings of 2⁻²⁴ in w / s, and its own


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_takes_the_nearest_code_of_the_paper(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    packed, absmax = formats.quantise_blocks(weight)
    count = weight.numel()
    assert packed.shape == (-(-count // 2),) and absmax.shape == (-(-count // 64),)
    found = formats.dequantise_blocks(packed, absmax, 64, count, torch.float64)
    blocks = weight.view(-1).split(64)
    assert torch.equal(absmax, torch.stack([part.abs().max() for part in blocks]))
    steps = absmax.double().repeat_interleave(64)[:count]
    levels = torch.tensor(formats.NF4, dtype=torch.float64) * steps[:, None]
    best = (levels - weight.double().view(-1, 1)).abs().amin(1)
    error = (found - weight.double().view(-1)).abs()
    assert (error <= best + 1e-6 * steps).all()


def test_a_row_of_zeros_stays_zero_and_damaged_weights_are_refused():
    weight = torch.zeros(3, 64)
    for kind in KINDS:
        made = nn.Linear(64, 3, bias=False)
        made.weight.data.copy_(weight)
        assert torch.equal(kind.of(made).dense(), weight)
        made.weight.data[1, 2] = torch.nan
        with pytest.raises(ModelError, match="not finite"):
            kind.of(made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient_are_those_of_the_dequantised_layer(kind, shape):
    """In float64, where the payload and its fp32 steps are exact: sums of at most 130 terms in another order."""
    layer = kind.of(linear(*shape)).double()
    plain, x = plain_linear(layer, torch.float64), rows(6, shape[1], torch.float64)
    y, z = layer(x.view(2, 3, -1)), plain(x.view(2, 3, -1))
    assert y.shape == z.shape and y.dtype == torch.float64
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, z)), rtol=1e-11, atol=0)


def test_the_gradient_is_the_functions_own():
    for kind in KINDS:
        layer = kind.of(linear(5, 7)).double()
        assert torch.autograd.gradcheck(layer, rows(3, 7, torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_alone(kind, dtype):
    layer = kind.of(linear(bias=False))
    x = rows().to(dtype).detach().requires_grad_()
    exact = x.detach().double() @ layer.dense(torch.float64).t()
    y = layer(x)
    assert y.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.detach().double(), exact, rtol=1.01 * half, atol=1e-3 * float(exact.abs().max()) * half)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    truth = layer.dense(torch.float64).sum(0).expand_as(x)
    torch.testing.assert_close(grad.double(), truth, rtol=1.01 * half, atol=1e-4 * float(truth.abs().max()) * half)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_for_backward(kind):
    layer, x = kind.of(linear()), rows()
    assert saved_bytes(lambda: layer(x).sum(), []) == 0  # not even x


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_read_again_in_backward(kind):
    """As under ZeRO-3: their data comes and goes between forward and backward, and the object stays."""
    layer, x = kind.of(linear()), rows()
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    held = {name: p.data for name, p in layer.named_parameters()}
    y = layer(x)
    for parameter in layer.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    for name, parameter in layer.named_parameters():
        parameter.data = held[name].clone()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_of_the_weight_is_dequantised_at_a_time(kind):
    layer, x = kind.of(linear(256, 512)), rows(1, 512)
    with Tracked() as found:
        torch.autograd.grad(layer(x).sum(), x)
    piece = 4 * formats.piece_rows(512, layer.weight_view.block) * 512
    assert piece < 4 * 256 * 512 / 8
    assert found.peak <= 4 * piece + 4 * 4 * (256 + 512)  # rows, codes and indices of a piece; x, y, gradients


@pytest.mark.parametrize("kind", KINDS)
def test_another_type_leaves_the_steps_alone(kind):
    layer = kind.of(linear()).to(torch.bfloat16)
    assert getattr(layer, layer.steps).dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
    assert all(not p.requires_grad for p in layer.parameters())


def test_state_dict_names():
    assert set(FrozenInt8Linear.of(linear()).state_dict()) == {"qweight", "scale", "bias"}
    assert set(FrozenNF4Linear.of(linear(bias=False)).state_dict()) == {"qweight", "absmax"}
    for kind in KINDS:
        layer, other = kind.of(linear()), kind.of(linear(bias=True).requires_grad_(False))
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(rows()), layer(rows()))


def test_outlier_columns_keep_full_precision():
    """The rest is off by half a step of each row of x and of each row of W (the latter in the layer itself)."""
    layer = FrozenInt8Linear.of(linear(bias=False), activations=True, outlier=4.0)
    x = rows().detach()
    x[2, 5], x[4, 70] = 60.0, -45.0
    y, dense = layer(x), layer.dense(torch.float64)
    outlier = (x.abs() > 4).any(0)
    assert outlier.sum() >= 2
    step = x.masked_fill(outlier, 0).abs().amax(1).double() / 127
    bound = (0.5 + 2e-5) * step[:, None] * dense[:, ~outlier].abs().sum(1)
    exact = x.double() @ dense.t()
    assert ((y.double() - exact).abs() <= bound + 1e-5 * exact.abs().max()).all()
    blunt = FrozenInt8Linear.of(linear(bias=False), activations=True, outlier=1e9)
    assert (blunt(x).double() - exact).norm() > 3 * (y.double() - exact).norm()


def test_activation_quantisation_has_the_weights_gradient():
    layer, plain = FrozenInt8Linear.of(linear(), activations=True), FrozenInt8Linear.of(linear())
    x = rows()
    assert saved_bytes(lambda: layer(x).sum(), []) == 0  # not even x
    assert torch.equal(*(torch.autograd.grad(m(x).sum(), x)[0] for m in (layer, plain)))


@pytest.mark.parametrize("width", [3, 1024, 2500])
def test_int8_products_are_exact(width):
    """All at 127 the sums reach 2²⁵, beyond fp32's whole numbers."""
    x = torch.full((2, width), 127, dtype=torch.int8)
    y = torch.randint(-127, 128, (3, width), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    y[0] = 127
    exact = x.long() @ y.long().t()
    assert torch.equal(kernels.exact_product(x, y).long(), exact)
    assert torch.equal(kernels.int8_product(x, y).long(), exact)


def test_bitsandbytes_is_asked_for_in_one_line_and_only_then(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(kernels.importlib, "import_module", missing)
    kernels.bitsandbytes.cache_clear()
    try:
        assert FrozenNF4Linear.of(linear())(rows()).isfinite().all()
        with pytest.raises(MissingExtraError, match=r"mitrain\[quant\]"), kernels.use("bitsandbytes"):
            pass
        with pytest.raises(ConfigError, match="choose one of auto, torch, bitsandbytes"), kernels.use("fast"):
            pass
    finally:
        kernels.bitsandbytes.cache_clear()


def with_avx512(packed, state):
    """bitsandbytes 0.50.2's nf4 kernel on a CPU with AVX-512: each row's first scale is row · ⌊columns / block⌋."""
    columns, codes = state.shape[-1], torch.stack([packed.view(-1) // 16, packed.view(-1) % 16], 1).view(-1).long()
    at = torch.arange(len(codes))
    scale = at // columns * (columns // state.blocksize) + at % columns // state.blocksize
    return (torch.tensor(formats.NF4)[codes] * state.absmax[scale]).view(state.shape).to(state.dtype)


@pytest.mark.parametrize("columns", [32, 64, 96, 160, 576])
def test_no_matrix_takes_a_path_of_bitsandbytes_that_depends_on_the_cpu(columns, monkeypatch):
    """Only flat rows are handed over, which are right everywhere; the fault itself is real at these widths."""
    shapes = []

    def spied(packed, state):
        shapes.append(tuple(state.shape))
        return with_avx512(packed, state)

    theirs = SimpleNamespace(QuantState=lambda **fields: SimpleNamespace(**fields), dequantize_4bit=spied)
    monkeypatch.setattr(kernels, "bitsandbytes", lambda: theirs)
    kernels.unpacks.cache_clear()
    try:
        plain = linear(48, columns, bias=False)
        layer, x = FrozenNF4Linear.of(plain), rows(2, columns)
        truth = formats.dequantise_blocks(layer.qweight, layer.absmax, 64, 48 * columns, torch.float64).view(48, -1)
        torch.testing.assert_close(layer.dense().double(), truth, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer(x).double(), x.double() @ truth.t(), rtol=1e-4, atol=1e-4)
        assert len(shapes) > 2 and all(len(shape) == 1 for shape in shapes)
    finally:
        kernels.unpacks.cache_clear()
    state = SimpleNamespace(shape=(48, columns), absmax=layer.absmax, blocksize=64, dtype=torch.float32)
    assert torch.allclose(with_avx512(layer.qweight, state).double(), truth, rtol=1e-6) == (columns % 64 == 0)


@pytest.mark.parametrize("fault", [True, False])
def test_a_known_fault_is_measured_where_one_is(fault, monkeypatch):
    def right(packed, state):
        return formats.dequantise_blocks(packed, state.absmax, 64, 48 * state.shape[1], state.dtype).view(state.shape)

    made = SimpleNamespace(QuantState=lambda **fields: SimpleNamespace(**fields))
    made.dequantize_4bit = with_avx512 if fault else right
    monkeypatch.setattr(kernels, "bitsandbytes", lambda: made)
    found = kernels.nf4_fault()
    assert found["columns"] == [32, 96, 160] if fault else found is None
    monkeypatch.setattr(kernels, "bitsandbytes", lambda: None)
    assert kernels.nf4_fault() is None


@pytest.mark.parametrize("fault", [True, False])
@pytest.mark.parametrize(("columns", "block"), [(32, 64), (64, 64), (96, 64), (64, 128), (128, 128)])
def test_nothing_attaches_to_a_model_whose_4_bit_matrices_are_wrong_here(fault, columns, block, monkeypatch):
    def right(packed, state):
        flat = formats.dequantise_blocks(packed, state.absmax, state.blocksize, 48 * state.shape[1], state.dtype)
        return flat.view(state.shape)

    made = SimpleNamespace(QuantState=lambda **fields: SimpleNamespace(**fields))
    made.dequantize_4bit = with_avx512 if fault else right
    monkeypatch.setattr(kernels, "bitsandbytes", lambda: made)
    kernels.is_wrong.cache_clear()
    model = tiny("llama")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.quant_state = SimpleNamespace(shape=(32, columns), blocksize=block)  # as bitsandbytes marks its own
    try:
        if fault and columns % block:
            with pytest.raises(ModelError, match=rf"^model\.layers\.1\.mlp\.down_proj of .* rows of {columns} wrongly"):
                attach(model, MiTConfig(modalities={"image": 6}, layers=[0]))
            assert model.training is False and any(p.requires_grad for p in model.parameters())
        else:
            attach(model, MiTConfig(modalities={"image": 6}, layers=[0])).detach()
    finally:
        kernels.is_wrong.cache_clear()


def test_bitsandbytes_fetches_no_kernel_while_it_is_imported(monkeypatch):
    asked = []

    def imported(name):
        from kernels import get_kernel

        asked.append(get_kernel)

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *a, **k: None))
    monkeypatch.setattr(kernels.importlib, "import_module", imported)
    assert kernels.bitsandbytes.__wrapped__() is None and asked == []
    assert sys.modules["kernels"].get_kernel() is None  # as it was
    monkeypatch.delitem(sys.modules, "kernels")
    with kernels.nothing_fetched(), pytest.raises(ImportError):
        import kernels as _  # noqa: F401
    assert "kernels" not in sys.modules


def test_a_kernel_that_does_not_run_is_a_fault(monkeypatch):
    made = SimpleNamespace(QuantState=lambda **fields: None)
    monkeypatch.setattr(kernels, "bitsandbytes", lambda: made)
    assert "32 (off by inf)" in kernels.nf4_fault()["measured"]


def test_the_kernels_choice_is_logged_once(caplog):
    kernels.tell.cache_clear()
    with caplog.at_level("INFO", "mitrain.models.quant.kernels"), kernels.use("torch"):
        for _ in range(3):
            FrozenNF4Linear.of(linear())(rows())
    assert [r.message for r in caplog.records] == ["nf4 on cpu: torch"]


def test_pieces_cover_the_rows_and_end_where_blocks_do():
    for shape in SHAPES:
        weight = FrozenNF4Linear.of(linear(*shape)).weight_view
        parts = list(weights.pieces(weight, torch.device("cpu")))
        assert [i for p in parts for i in range(p.start, p.stop)] == list(range(shape[0]))
        assert all(p.start * shape[1] % 64 == 0 for p in parts)
