"""backbones/efficientnet_lite.py: the published sizes, the padding, and a life as a Hugging Face model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from mitrain.models.efficientnet_lite import (
    ConvNorm,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    InvertedResidual,
    pad_same,
    register,
    rounded,
)

CLASSIFIER = 1280 * 1000 + 1000
SMALL = {"stem_channels": 8, "hidden_size": 24, "stages": ((1, 3, 1, 1, 8), (2, 5, 2, 6, 16), (1, 3, 1, 6, 24))}


@pytest.fixture
def small() -> EfficientNetLiteModel:
    torch.manual_seed(0)
    model = EfficientNetLiteModel(EfficientNetLiteConfig(**SMALL)).eval()
    for module in model.modules():  # statistics as after training, so that every one of them matters
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("width", "depth", "published"),  # lite0 to lite4 with the classifier, in millions, from the release's table
    [(1.0, 1.0, 4.7), (1.0, 1.1, 5.4), (1.1, 1.2, 6.1), (1.2, 1.4, 8.2), (1.4, 1.8, 13.0)],
)
def test_parameter_counts_are_the_published_ones(width: float, depth: float, published: float):
    with torch.device("meta"):
        model = EfficientNetLiteModel(EfficientNetLiteConfig(width_coefficient=width, depth_coefficient=depth))
    count = sum(p.numel() for p in model.parameters()) + CLASSIFIER
    assert round(count / 1e6, 1) == published


def test_lite0_to_the_last_parameter():
    with torch.device("meta"):
        model = EfficientNetLiteModel(EfficientNetLiteConfig())
    assert sum(p.numel() for p in model.parameters()) + CLASSIFIER == 4_652_008
    assert len(model.blocks) == 16


@pytest.mark.parametrize(("channels", "expected"), [(16, 16), (17.6, 16), (20, 24), (44.0, 48), (11, 16), (3, 8)])
def test_widths_are_multiples_of_eight_that_lose_less_than_a_tenth(channels: float, expected: int):
    assert rounded(channels) == expected


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (7, 10), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_padding_puts_every_window_where_tensorflow_puts_it(size: tuple[int, int], kernel: int, stride: int):
    """Window i starts at i·stride - ⌊missing/2⌋; what it covers outside the image counts as zero."""
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    rows = F.conv2d(pad_same(x, kernel, stride), torch.ones(1, 1, kernel, kernel, dtype=torch.float64), stride=stride)
    assert rows.shape[-2:] == tuple(-(-s // stride) for s in size)
    starts = [-(max((-(-s // stride) - 1) * stride + kernel - s, 0) // 2) for s in size]
    for i in range(rows.shape[-2]):
        for j in range(rows.shape[-1]):
            top, left = i * stride + starts[0], j * stride + starts[1]
            window = x[0, 0, max(top, 0) : max(top + kernel, 0), max(left, 0) : max(left + kernel, 0)]
            torch.testing.assert_close(rows[0, 0, i, j], window.sum())


def test_an_odd_zero_goes_to_the_bottom_and_right():
    padded = pad_same(torch.ones(1, 1, 4, 4), kernel=3, stride=2)
    assert padded.shape == (1, 1, 5, 5)
    assert padded[0, 0, -1].sum() == 0 == padded[0, 0, :, -1].sum() and padded[0, 0, 0, 0] == 1


def test_activation_is_cut_at_six_and_left_out_where_asked():
    x = torch.tensor([-9.0, 3.0, 9.0]).view(1, 3, 1, 1)
    for active, expected in ((True, [0.0, 3.0, 6.0]), (False, [-9.0, 3.0, 9.0])):
        layer = ConvNorm(3, 3, eps=0.0, active=active).eval()
        torch.nn.init.dirac_(layer.conv.weight)
        assert layer(x).flatten().tolist() == expected


def test_a_block_adds_its_input_only_where_shapes_allow():
    x = torch.randn(2, 8, 6, 6)
    for after, stride, added in ((8, 1, True), (16, 1, False), (8, 2, False)):
        block = InvertedResidual(8, after, kernel=3, stride=stride, expansion=6, eps=1e-3).eval()
        torch.nn.init.zeros_(block.project.conv.weight)
        out = block(x)
        assert out.shape == (2, after, 6 // stride, 6 // stride)
        assert torch.equal(out, x) if added else out.abs().max() == 0


@pytest.mark.parametrize(("size", "grid"), [(32, 8), (33, 9), (30, 8)])
def test_shapes(small: EfficientNetLiteModel, size: int, grid: int):
    output = small(pixel_values=torch.randn(2, 3, size, size))
    assert output.last_hidden_state.shape == (2, 24, grid, grid)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.flatten(2).mean(-1))
    assert output.hidden_states is None
    assert small(torch.randn(2, 3, size, size), return_dict=False)[1].shape == (2, 24)


def test_hidden_states_are_the_stem_and_every_block(small: EfficientNetLiteModel):
    output = small(torch.randn(1, 3, 32, 32), output_hidden_states=True)
    assert [map_.shape[1] for map_ in output.hidden_states] == [8, 8, 16, 16, 24]
    assert [map_.shape[2] for map_ in output.hidden_states] == [16, 16, 8, 8, 8]
    assert torch.equal(small.head(output.hidden_states[-1]), output.last_hidden_state)


def test_save_and_load_through_the_auto_classes(small: EfficientNetLiteModel, tmp_path: Path):
    register()
    register()
    small.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, EfficientNetLiteConfig) and config.blocks() == small.config.blocks()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, EfficientNetLiteModel) and not loaded.training
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x).pooler_output, small(x).pooler_output)


def test_convolutions_see_channels_last_to_the_end(small: EfficientNetLiteModel):
    """Else oneDNN brings what each of them reads into another order."""
    seen = []
    for module in small.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    small(torch.randn(2, 3, 30, 30))
    assert len(seen) > 8 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
