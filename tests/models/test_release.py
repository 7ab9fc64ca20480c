"""Frozen weights that were let go of: what stays, and that they come back bit for bit when something runs them."""

import os
from pathlib import Path

import pytest
import torch
from folders import llm_folder, vision_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import DEPTH, NAMES, text, tiny
from transformers import AutoModelForCausalLM

from mitrain.core.errors import ModelError
from mitrain.models import ImageConfig, ImageEncoder, TextBackbone
from mitrain.models.frozen import replay, trunk_states
from mitrain.models.layouts import layers_of
from mitrain.models.release import below, equal, is_released, leave_files, release


def held_bytes(model):
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in model.parameters()}.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_below_are_gone_and_come_back_when_they_are_run(name, dtype, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).requires_grad_(False).eval()
    inputs, before = text(padding="right"), {n: p.clone() for n, p in model.named_parameters()}
    states, whole = trunk_states(model, 2, **inputs), model(**inputs, use_cache=False).logits
    tied = [*model.get_output_embeddings().parameters()]
    gone = release(model, tmp_path, below(model, 2, speaks=True))
    layers = {n: p for n, p in model.named_parameters() if ".layers.0." in n or ".layers.1." in n}
    assert layers and all(map(is_released, layers.values())) and not any(map(is_released, tied))
    assert gone >= sum(before[n].nbytes for n in layers)
    assert all(p.shape == before[n].shape and p.isnan().all() for n, p in layers.items())
    with replay(model, 2, states):  # what lies above needs none of it
        above = model(inputs_embeds=states, attention_mask=inputs["attention_mask"], use_cache=False).logits
    shown = inputs["attention_mask"].bool()
    assert torch.equal(above[shown], whole[shown]) and all(map(is_released, layers.values()))
    assert torch.equal(model(**inputs, use_cache=False).logits[shown], whole[shown])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tied_head_comes_back_by_itself(tmp_path):
    llm_folder(tmp_path)
    whole, model = (TextBackbone.load(tmp_path, torch.float32).model for _ in range(2))
    model.tie_weights()
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    release(model, tmp_path, below(model, 1, speaks=False))
    states = torch.ones(1, whole.config.hidden_size)
    head, own = model.get_output_embeddings(), whole.get_input_embeddings().weight
    assert is_released(head.weight)
    torch.testing.assert_close(head(states), states @ own.T)  # where weights begin in memory decides how sums are rounded
    assert torch.equal(head.weight, own)


def test_one_layer_that_is_run_brings_back_no_other(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    release(model, tmp_path, layers_of(model).modules())
    trunk_states(model, 1, **text())
    assert [any(map(is_released, layer.parameters())) for layer in layers_of(model)] == [False] + [True] * (DEPTH - 1)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_low_bit_layers_come_back(quantize, tmp_path):
    backbone = TextBackbone.load(llm_folder(tmp_path), torch.float32, quantize=quantize)
    rows = [backbone.tokens("the picture shows a red square")]
    before = backbone.trunk(rows, 2)[0]
    held = held_bytes(backbone.model)
    gone = release(backbone.model, tmp_path, layers_of(backbone.model)[:2].modules())
    assert gone > 2 * 32 * 64 and held_bytes(backbone.model) < held - gone / 2
    assert torch.equal(backbone.trunk(rows, 2)[0], before)


def test_an_encoder_whose_tensors_transformers_renamed_is_found_by_content(tmp_path):
    folder = vision_folder(tmp_path)
    stored = load_file(folder / "model.safetensors")
    encoder = ImageEncoder(ImageConfig(name=str(folder)), folder)
    assert set(stored) - {n for n, _ in encoder.model.named_parameters()}  # or this shows nothing
    pixels = torch.rand(2, 3, 28, 28)
    before = encoder.encode(list(pixels))["pooled"]
    gone = release(encoder.model, folder, encoder.model.modules())
    assert gone == sum(p.nbytes for p in encoder.model.parameters()) and all(map(is_released, encoder.model.parameters()))
    assert torch.equal(encoder.encode(list(pixels))["pooled"], before)


def test_what_is_not_as_it_is_stored_stays(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    changed, trained = layers_of(model)[0].mlp.up_proj.weight, layers_of(model)[1].mlp.up_proj.weight
    changed[-1, -1] += 1
    trained.requires_grad_(True)
    release(model, tmp_path, layers_of(model)[:2].modules())
    assert not is_released(changed) and not is_released(trained)
    assert is_released(layers_of(model)[0].mlp.down_proj.weight)
    assert release(model, None, model.modules()) == release(model, tmp_path / "none", model.modules()) == 0


def test_a_checkpoint_that_was_replaced_is_not_read(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    release(model, tmp_path, layers_of(model)[:2].modules())
    file = tmp_path / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, tmp_path / "other", {"format": "pt"})
    os.replace(tmp_path / "other", file)
    with pytest.raises(ModelError, match="were replaced while they were being used: start again"):
        model(**text())


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"quantize": "int8"}, {"quantize": "nf4"}])
def test_what_is_left_in_the_checkpoint_is_the_same_model(options, tmp_path):
    options = {"dtype": torch.float32} | options
    whole = TextBackbone.load(llm_folder(tmp_path), **options)
    lean = TextBackbone.load(tmp_path, **options, unread=lambda model: below(model, 2, speaks=False))
    expected = dict(whole.model.named_parameters())
    gone = {n for n, p in lean.model.named_parameters() if is_released(p)}
    assert {n.split(".")[2] for n in gone if ".layers." in n} == {"0", "1"} and any("embed_tokens" in n for n in gone)
    assert all(torch.equal(p, expected[n]) for n, p in lean.model.named_parameters() if n not in gone)
    held = held_bytes(lean.model)
    assert held < held_bytes(whole.model) - sum(expected[n].nbytes for n in gone) / 2
    # Neither the caches' address nor whether the model can go on from cached states brings anything back.
    assert lean.identity(2) == whole.identity(2) and lean.replays(2) is whole.replays(2) is True
    assert held_bytes(lean.model) == held
    rows = [whole.tokens("the picture shows a red square")]
    assert torch.equal(lean.hidden(*lean.pad(rows)), whole.hidden(*whole.pad(rows)))
    assert all(torch.equal(p, expected[n]) for n, p in lean.model.named_parameters() if ".layers." in n)


def test_a_tied_embedding_stays_with_the_head_that_speaks(tmp_path):
    llm_folder(tmp_path)
    lean = TextBackbone.load(tmp_path, torch.float32, unread=lambda model: below(model, 1, speaks=True))
    head = lean.model.get_output_embeddings().weight
    tied = head is lean.model.get_input_embeddings().weight
    assert not is_released(head) and is_released(lean.model.get_input_embeddings().weight) is not tied
    assert is_released(layers_of(lean.model)[0].mlp.down_proj.weight)


def test_weights_that_are_not_finite_are_told_when_they_are_read(tmp_path):
    llm_folder(tmp_path)
    values = load_file(tmp_path / "model.safetensors")
    values["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    lean = TextBackbone.load(tmp_path, torch.float32, unread=lambda model: below(model, 1, speaks=True))
    with pytest.raises(ModelError, match="not finite .the first in model.layers.0.mlp.down_proj.weight"):
        lean.identity(1)


def resident_pages_of_files():
    return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux alone says what a process has mapped")
def test_pages_of_a_checkpoint_that_is_in_use_in_part_go_and_come_back(tmp_path):
    """Two tensors of 8 MiB in one map: that of the first leaves the process, and is read again; others stay as they are."""
    tensors = {name: torch.full((2, 1 << 20), value) for name, value in (("gone", 1.0), ("kept", 2.0))}
    save_file(tensors, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        gone, kept = (file.get_tensor(name) for name in tensors)
    elsewhere = torch.full((2, 1 << 20), 3.0)
    before = [x.sum() for x in (gone, kept, elsewhere)] and resident_pages_of_files()
    leave_files([gone, elsewhere])
    assert before - resident_pages_of_files() > 7 * 1024
    assert torch.equal(gone, tensors["gone"]) and torch.equal(kept, tensors["kept"])
    assert torch.equal(elsewhere, torch.full_like(elsewhere, 3.0)), "what lies in no file is left alone"


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux alone says what a process has mapped")
def test_comparing_a_large_tensor_with_its_file_leaves_none_of_it_in_the_process(tmp_path):
    """64 MiB, of which the last element alone differs once."""
    held = torch.ones(4, 1 << 22)
    save_file({"table": held}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = file.get_tensor("table")
    before = resident_pages_of_files()
    assert equal(stored, held) and resident_pages_of_files() - before < 8 * 1024
    held[-1, -1] = 2
    assert not equal(stored, held)
