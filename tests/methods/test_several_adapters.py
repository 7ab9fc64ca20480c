"""Several adapters on one model, one of which acts in each context: to the bit what each says alone, in every thread."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tiny import NAMES, scramble, tiny

import mitrain
from mitrain import methods
from mitrain.core import config
from mitrain.core.errors import ModelError

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
FEATURES = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "a": mitrain.MiTConfig(modalities={"image": 6}, layers=[1, 3]),
    "b": mitrain.MiTConfig(modalities={"image": 6}, layers=[2, 3], rank=2, gate="none", cosine=False),
}


def put(model, name, seed):
    torch.manual_seed(seed)
    mit = mitrain.attach(model, CONFIGS[name], name=name)
    scramble(mit, seed=seed)
    return mit


def alone(architecture="llama"):
    """What each adapter says by itself on a model of its own, and the plain model."""
    said = {None: logits(tiny(architecture))}
    for seed, name in enumerate(CONFIGS):
        put(model := tiny(architecture), name, seed)
        said[name] = logits(model, infused={"image": FEATURES})
    assert len({tensor.numpy().tobytes() for tensor in said.values()}) == 3
    return said


def both(architecture="llama"):
    model = tiny(architecture)
    return model, {name: put(model, name, seed) for seed, name in enumerate(CONFIGS)}


@torch.no_grad()
def logits(model, **more):
    return model(IDS, **more).logits


@pytest.mark.parametrize("architecture", NAMES)
def test_each_says_to_the_bit_what_it_says_alone(architecture):
    expected, (model, adapters) = alone(architecture), both(architecture)
    given = {"infused": {"image": FEATURES}}
    assert torch.equal(logits(model, **given), expected["a"])  # the first, where nothing was chosen
    for name in ("b", "a", "b"):
        mitrain.set_adapter(model, name)
        assert torch.equal(logits(model, **given), expected[name]) and torch.equal(logits(model), expected[None])
        for other in ("a", "b"):
            with mitrain.using_adapter(model, other):
                assert torch.equal(logits(model, **given), expected[other])
            with adapters[other].bind({"image": FEATURES}):
                assert torch.equal(logits(model), expected[other])
    with adapters["a"].bind({"image": FEATURES}):
        with adapters["b"].bind({"image": -FEATURES}), mitrain.using_adapter(model, "a"):
            assert torch.equal(logits(model), expected["a"])
        with mitrain.using_adapter(model, None):
            assert torch.equal(logits(model), expected[None])
    adapters["b"].detach()
    adapters["a"].detach()
    assert torch.equal(logits(model), expected[None]) and not model.config._attn_implementation.startswith("infused")
    assert not [name for name, _ in model.named_modules() if name in ("a", "b")]


def test_switched_off_means_that_features_are_refused():
    model, _ = both()
    mitrain.set_adapter(model, None)
    with pytest.raises(ModelError, match="a model none of whose adapters acts here: choose one with mitrain.set_adapter"):
        model(IDS, infused={"image": FEATURES})
    with mitrain.using_adapter(model, "b"):
        assert not torch.equal(logits(model, infused={"image": FEATURES}), logits(model))


def test_what_is_generated_is_that_of_the_chosen_one():
    model, adapters = both()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = {}
    for seed, name in enumerate(CONFIGS):
        put(single := tiny("llama"), name, seed)
        with getattr(single, name).bind({"image": FEATURES}):
            expected = single.generate(IDS, **options)
        with adapters[name].bind({"image": FEATURES}):
            found[name] = model.generate(IDS, **options)
        assert torch.equal(found[name], expected)


def test_threads_and_tasks_that_choose_differently_do_not_meet():
    expected, (model, _) = alone(), both()
    start = Barrier(4)

    def asked(name):
        start.wait(60)
        with mitrain.using_adapter(model, name):
            return [logits(model, infused={"image": FEATURES}) for _ in range(10)]

    names = ["a", "b", "a", "b"]
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(names, pool.map(asked, names), strict=True):
            assert all(torch.equal(each, expected[name]) for each in found)

    async def task(name):
        with mitrain.using_adapter(model, name):
            await asyncio.sleep(0)
            mitrain.set_adapter(model, "b" if name == "a" else "a")  # for those who have chosen nothing
            await asyncio.sleep(0)
            return logits(model, infused={"image": FEATURES})

    async def main():
        return await asyncio.gather(*map(task, names))

    assert all(torch.equal(each, expected[name]) for name, each in zip(names, asyncio.run(main()), strict=True))


def test_each_is_trained_by_itself():
    model, adapters = both()
    model.train()
    assert all(adapter.training and p.requires_grad for adapter in adapters.values() for p in adapter.parameters())
    assert not any(layer.training for layer in model.model.layers)
    model(IDS, infused={"image": FEATURES}, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in adapters["a"].parameters())
    assert all(p.grad is None for p in adapters["b"].parameters())


def test_one_of_several_is_saved_and_loaded_under_a_name(tmp_path):
    expected, (_, adapters) = alone(), both()
    for name, adapter in adapters.items():
        adapter.save_pretrained(tmp_path / name)
    frozen = json.loads((tmp_path / "a" / "mitrain.json").read_text())["parameters"]["frozen"]
    assert frozen == sum(p.numel() for p in tiny("llama").parameters())
    other = tiny("llama")
    for name in ("b", "a"):
        mitrain.load_adapter(other, tmp_path / name, name=name)
    mitrain.set_adapter(other, "a")
    assert torch.equal(logits(other, infused={"image": FEATURES}), expected["a"])
    with mitrain.using_adapter(other, "b"):
        assert torch.equal(logits(other, infused={"image": FEATURES}), expected["b"])


def test_what_cannot_be_is_one_line(tmp_path):
    model, adapters = both()
    for call, words in (
        (lambda: mitrain.attach(model, CONFIGS["a"], name="a"), "has a a adapter .* give another name="),
        (lambda: mitrain.attach(model, CONFIGS["a"], name="a.b"), "'a.b' is no name of an adapter"),
        (lambda: mitrain.set_adapter(model, "c"), "no adapter 'c' is attached to this model: it has a, b"),
        (adapters["a"].detach, "b was attached to the model after a: detach it first"),
        (lambda: adapters["a"].set_checkpointing(True), "activation checkpointing serves a model with one adapter"),
    ):
        with pytest.raises(ModelError, match=words):
            call()
    adapters["b"].detach()
    mitrain.set_adapter(model, "a")
    adapters["a"].set_checkpointing(True)
    with pytest.raises(ModelError, match="activation checkpointing serves a model with one adapter: switch it off"):
        put(model, "b", 1)
    lora = methods.build(config.choose("adapter", {"name": "lora"}))
    lora.attach({"text": tiny("llama")})
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ModelError, match="lora cannot take turns with other adapters"):
        mitrain.load_adapter(tiny("llama"), tmp_path / "lora", name="x")


def test_one_that_was_chosen_and_is_gone_is_not_replaced_in_silence():
    model, adapters = both()
    mitrain.set_adapter(model, "b")
    adapters["b"].detach()
    with pytest.raises(ModelError, match="none of whose adapters acts here"):
        model(IDS, infused={"image": FEATURES})
