"""Generation: with a KV cache as without one, for every architecture and every way the cache is moved about."""

import copy

import pytest
import torch
from mitrain_kernels.infused_attention import prefix_sums
from tiny import CACHE, NAMES, WINDOW, features, scramble, text, tiny
from transformers import DynamicCache, StaticCache

import mitrain
from mitrain import MiTConfig
from mitrain.core.errors import ModelError
from mitrain.methods.mit.gate_cache import GateHistory

GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
ROUNDED = 1e-5  # transformers' norms round to float32 inside a float64 model
SETTINGS = [{}, {"gate": "token", "k_add": True}, {"gate": "none"}, {"cosine": False}]


def attached(name="llama", **settings):
    """In float64, but for Gemma 2: transformers' additive masks of eager attention are NaN there."""
    model = tiny(name, torch.float32 if name == "gemma2" else torch.float64)
    mit = mitrain.attach(model, MiTConfig(**{"modalities": {"image": 6}, "layers": [1, 2, 3], **settings}))
    scramble(mit)
    return model, mit


def tolerance(name):
    return 5e-4 if name == "gemma2" else ROUNDED


def steps(model, inputs, sizes, cache=None):
    """Logits of ``inputs`` given in pieces of ``sizes`` tokens, each continuing from the cache."""
    cache, pieces, start = cache if cache is not None else DynamicCache(config=model.config), [], 0
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for size in sizes:
        new = slice(start, start + size)
        with torch.no_grad():
            pieces.append(
                model(
                    input_ids=inputs["input_ids"][:, new],
                    attention_mask=inputs["attention_mask"][:, : start + size],
                    position_ids=positions[:, new],
                    **{CACHE: cache},
                ).logits
            )
        start += size
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(name, beams):
    model, mit = attached(name)
    inputs = text(padding="left")
    assert inputs["input_ids"].shape[1] > WINDOW
    with mit.bind({"image": features()}, copies=beams):
        cached, whole = (model.generate(**inputs, **GREEDY, num_beams=beams, use_cache=use) for use in (True, False))
    assert cached.past_key_values is not None and whole.past_key_values is None
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.scores, whole.scores, strict=True):
        seen = one.isfinite()
        assert (one - other)[seen].abs().max() < tolerance(name)
    plain = model.generate(**inputs, **GREEDY, num_beams=beams)
    assert not torch.equal(plain.sequences, cached.sequences)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_gate_generates_the_same_with_a_cache(name, settings):
    model, mit = attached(name, **settings)
    with mit.bind({"image": features()}, copies=2):
        results = [model.generate(**text(padding="left"), **GREEDY, num_beams=2, use_cache=use) for use in (True, False)]
    assert torch.equal(results[0].sequences, results[1].sequences)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_pieces_through_a_cache_equal_one_forward_pass(name, padding):
    model, mit = attached(name)
    inputs = text(padding=padding)
    kept = inputs["attention_mask"] == 1
    with mit.bind({"image": features()}):
        whole = steps(model, inputs, [9])
        for sizes in ([1] * 9, [5, 4], [6, 1, 1, 1], [2, 3, 4]):
            assert (steps(model, inputs, sizes) - whole)[kept].abs().max() < tolerance(name)
        lazy = steps(model, inputs, [5, 4], cache=DynamicCache())
    assert (lazy - whole)[kept].abs().max() < tolerance(name)


def test_sampling_with_several_returned_sequences():
    model, mit = attached("mistral")
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}
    with mit.bind({"image": features()}, copies=2):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(model.generate(**text(padding="left"), **options, use_cache=use_cache))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_prompt_lookup_crops_the_cache(name):
    """Assisted decoding proposes several tokens, and crops the cache by those that are refused."""
    model, mit = attached(name)
    inputs = text(rows=1)
    inputs["input_ids"][:, 5:] = inputs["input_ids"][:, :4]  # something to look up
    with mit.bind({"image": features(rows=1)}):
        plain = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 12})
        looked_up = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, looked_up)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_whatever_is_done_to_the_cache_is_done_to_the_gate(name):
    """Repeat, select, reorder, copy, crop: then the next step must equal a forward pass without a cache."""
    model, mit = attached(name)
    inputs, feature = text(padding="left"), features(dtype=torch.float64)
    head = {key: value[:, :6] for key, value in inputs.items()}
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    order = torch.tensor([1, 0, 2, 2, 5, 4])
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with mit.bind({"image": feature}, copies=None):
        steps(model, head, [6], cache=cache)
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(order)
        cache = copy.deepcopy(cache)
        cache.batch_select_indices(torch.tensor([3, 0, 5, 1]))
    chosen = rows[order][torch.tensor([3, 0, 5, 1])]
    picked = {key: value[chosen] for key, value in inputs.items()}
    with mit.bind({"image": feature[chosen]}):
        whole = steps(model, picked, [9])
        position = (picked["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, 5:]
        with torch.no_grad():
            rest = model(
                input_ids=picked["input_ids"][:, 5:],
                attention_mask=picked["attention_mask"],
                position_ids=position,
                **{CACHE: cache},
            ).logits
    assert (rest - whole[:, 5:]).abs().max() < ROUNDED


def test_a_cache_filled_under_other_features_is_summed_again_from_its_values():
    model, mit = attached()
    inputs, feature = text(), features(dtype=torch.float64)
    cache = DynamicCache(config=model.config)
    with mit.bind({"image": feature}):
        steps(model, {key: value[:, :6] for key, value in inputs.items()}, [6], cache=cache)
    history = [x for x in cache.layers if isinstance(x, GateHistory)]
    assert [x.layer_idx for x in history] == [1, 2, 3] and all(x.sums.count.shape == (3, 6) for x in history)
    other = feature.flip(0)
    values = cache.layers[1].values
    with mit.bind({"image": other}), torch.no_grad():
        model(input_ids=inputs["input_ids"][:, 6:], **{CACHE: cache})
        maps = mit.infused["1"]({"image": other}, {})
    fresh = prefix_sums(values, maps.v_add)
    assert (history[0].sums.dot[..., :6] - fresh.dot).abs().max() < 1e-11


def test_a_window_that_dropped_values_cannot_change_features():
    model, mit = attached("mistral")
    inputs, cache = text(), DynamicCache(config=tiny("mistral").config)
    with torch.no_grad():
        with mit.bind({"image": features()}):
            model(input_ids=inputs["input_ids"], **{CACHE: cache})
        with mit.bind({"image": features()}):  # equal features, bound again: another turn of a conversation
            model(input_ids=inputs["input_ids"][:, :2], **{CACHE: cache})
        with (
            mit.bind({"image": features(seed=7)}),
            pytest.raises(ModelError, match="filled under other features and its window has dropped values"),
        ):
            model(input_ids=inputs["input_ids"][:, :2], **{CACHE: cache})


def test_a_cache_filled_without_features_is_summed_from_its_values():
    model, mit = attached()
    inputs, cache = text(padding="left"), DynamicCache(config=tiny().config)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :6], attention_mask=inputs["attention_mask"][:, :6], **{CACHE: cache})
        values = cache.layers[1].values
        with mit.bind({"image": features()}):
            model(input_ids=inputs["input_ids"][:, 6:], attention_mask=inputs["attention_mask"], **{CACHE: cache})
            maps = mit.infused["1"]({"image": features().double()}, {})
    expected = prefix_sums(values, maps.v_add, inputs["attention_mask"][:, :6] == 1)
    entry = next(x for x in cache.layers if isinstance(x, GateHistory))
    for got, want in zip(entry.sums, expected, strict=True):
        assert (got[..., :6] - want).abs().max() < 1e-11
    assert entry.sums.count[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]


def test_maps_are_computed_once_per_generation_and_again_when_the_weights_change():
    model, mit = attached()
    calls = []
    mit.infused["2"].register_forward_pre_hook(lambda *_: calls.append(1))
    with mit.bind({"image": features()}):
        one = model.generate(**text(), **GREEDY).scores[0]
        assert len(calls) == 1
        scramble(mit, seed=9)
        other = model.generate(**text(), **GREEDY).scores[0]
    assert len(calls) == 2 and not torch.equal(one, other)


# What cannot generate


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_the_sequence_gate_refuses_to_generate(use_cache, beams):
    model, mit = attached(gate="sequence")
    with (
        mit.bind({"image": features()}, copies=beams),
        pytest.raises(ModelError, match=r"cannot generate: set adapter.gate"),
    ):
        model.generate(**text(), **GREEDY, use_cache=use_cache, num_beams=beams)
    model.generate(**text(), **GREEDY, use_cache=use_cache)  # without features it is the frozen model


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_cache_of_fixed_size_is_refused(settings):
    model, mit = attached(**settings)
    with mit.bind({"image": features()}), pytest.raises(ModelError, match="StaticCache cannot be used"):
        model.generate(**text(), **GREEDY, cache_implementation="static")
    cache = StaticCache(config=model.config, max_cache_len=20)
    with mit.bind({"image": features()}), pytest.raises(ModelError, match="StaticCache cannot be used"):
        model(**text(), **{CACHE: cache})


def test_forgotten_copies_are_named():
    model, mit = attached()
    with (
        mit.bind({"image": features()}),
        pytest.raises(ModelError, match=r"3 samples, but the batch has 6 rows.*num_beams"),
    ):
        model.generate(**text(), **GREEDY, num_beams=2)
