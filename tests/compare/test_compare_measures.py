"""What a step saves and computes, counted on modules whose numbers are known; and counted cells."""

import pytest
import torch
from source_tree import ROOT
from torch import nn

from mitrain.compare import cells, counts, study
from mitrain.compare.counts import count
from mitrain.compare.measures import Saved, attention_flops, step_ms
from mitrain.core.errors import ConfigError

STUDIES = ROOT / "configs" / "studies"


def test_saved_storages_count_once_and_weights_not_at_all():
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    with Saved(layer.parameters()) as saved:
        y = layer(x)
        z = y.sigmoid()
        total = (z[:2] * z[:2]).sum()
        kept = saved.bytes
    assert kept == 4 * (x.numel() + z.numel()), "the layer's input, and its output whose views are squared"
    total.backward()
    reference = torch.nn.functional.linear(x.double(), layer.weight.detach().double(), layer.bias.detach().double())
    p = reference.sigmoid()
    inner = 2 * p * p * (1 - p)
    inner[2:] = 0
    assert torch.allclose(layer.bias.grad.double(), inner.sum(0), rtol=1e-5, atol=1e-6), "gradients are untouched"


def test_nothing_is_saved_without_gradients():
    layer = nn.Linear(6, 5).requires_grad_(False)
    with Saved(layer.parameters()) as saved:
        layer(torch.randn(4, 6))
    assert saved.bytes == 0


def test_infused_attention_counts_as_attention_of_every_query_head():
    q, k = (2, 8, 5, 16), (2, 2, 7, 16)
    assert attention_flops(q, k, k) == 2 * 2 * (2 * 8 * 5 * 7 * 16)


def test_step_times_are_the_median_of_training_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"kind": "train", "step": {i}, "seconds": {s}}}' for i, s in enumerate((9.0, 0.01, 0.03, 0.02, 0.04))]
    path.write_text("\n".join([*lines, '{"kind": "val", "step": 5, "accuracy": 1}']) + "\n")
    assert step_ms(tmp_path) == 30.0
    path.write_text("")
    assert step_ms(tmp_path) is None


def counted(name, **point):
    path = STUDIES / f"{name}.yaml"
    found = study.read(path)
    (place,) = [p for p in cells.cell_ids(found) if not point or {p.axis: p.at} == point]
    cell = cells.resolve(found, path, place)
    return count(cell.config, cell.count)


LLAMA, CLIP = 6_738_415_616, 304_293_888
LAYER, DECODER = 21_064_480, 1_620_642  # 4 (768 d + d) + 768 f + f + H; the decoder
HEAD = 32_000 * 4096


@pytest.mark.parametrize("layers", [5, 8])
def test_m1_is_the_formula(layers):
    row = counted("m1", layers=layers)
    assert row["trainable_parameters"] == layers * LAYER + DECODER
    assert row["frozen_parameters"] == LLAMA + CLIP and row["backbone_parameters"] == LLAMA + CLIP - HEAD
    percent = 100 * row["trainable_parameters"] / row["backbone_parameters"]
    assert round(percent, 2) == {5: 1.55, 8: 2.46}[layers]


def test_m2_is_the_published_compute():
    row = counted("m2")
    token = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    causal = 32 * 4096 * 43 * 44
    assert row["text_macs"] == 43 * token + causal
    assert row["adapter_macs"] == 8 * 768 * (4 * 4096 + 11008)
    assert row["image_tokens"] == 576 and round(row["vision_macs"] / 1e12, 3) == 0.191
    assert round(row["method_macs"] / 1e12, 3) == 0.470
    assert row["prepended_language_macs"] == 619 * token + 32 * 4096 * 619 * 620


def test_m3_is_flat_for_mit_alone():
    small, large = counted("m3", side=224), counted("m3", side=672)
    assert small["language_macs"] == large["language_macs"] and large["image_tokens"] == 9 * small["image_tokens"]
    assert large["prepended_language_macs"] > 7 * small["prepended_language_macs"]


def test_pmf_has_the_published_share():
    layers = 2
    row = counted("p1", fusion_layers=layers)
    adapter = layers * (6 * 4 * 768 + 2 * (768 * 384 + 384 + 384 * 768 + 768))
    assert row["adapter_parameters"] == adapter and row["head_parameters"] == 2 * 768 * 101 + 101
    assert round(100 * row["share"], 2) == 1.29


def test_auroras_u_and_v():
    row = counted("a1", rank=64)
    assert row["parts"]["modes.down.shared"] + row["parts"]["modes.up.shared"] == 98_304
    assert row["adapter_parameters"] == 98_304 + 145 * 64


def test_bad_options_are_one_line():
    with pytest.raises(ConfigError, match="unknown key 'count.sides' .did you mean 'side'"):
        counts.count(None, {"sides": 3})
