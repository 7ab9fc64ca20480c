"""What enters a method's first changed layer: cached or not, by layer, picture and view."""

import pytest
import torch
from folders import colour_records, llm_folder, vision_folder
from modalities import Pictures

from mitrain.data.hidden_states import EncoderStates, TextStates
from mitrain.data.images import open_image
from mitrain.models import ImageConfig, ImageEncoder, TextBackbone

IMAGES = [f"images/{i}.png" for i in range(4)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("states")
    folder = vision_folder(path / "vision")
    encoder = ImageEncoder(ImageConfig(name=str(folder)), folder)
    images = Pictures([encoder], colour_records(path / "data", train=4, val=4), None, 10**6)
    return encoder, images, TextBackbone.load(llm_folder(path / "llm"), torch.float32)


def asked(images, states):
    return Pictures([states.encoder], images.index.root, None, also=states)


def prepare(images, states, views=1):
    return asked(images, states).prepare(IMAGES, views)


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_cached_and_uncached_are_what_enters_the_layer(world, tmp_path, depth):
    encoder, images, _ = world
    plain, cached = EncoderStates(encoder, depth, None), EncoderStates(encoder, depth, tmp_path)
    assert prepare(images, plain, 2) == 0 and prepare(images, cached, 2) == 8
    views = [0, 1, 1, 0]
    found = asked(images, cached).states(IMAGES, views)
    assert torch.equal(found, asked(images, plain).states(IMAGES, views))
    pixels = encoder._items([open_image(images.index.root, path, images.limits.pixels) for path in IMAGES], views)
    hidden = encoder.model(pixel_values=encoder._batch(pixels), output_hidden_states=True).hidden_states[depth]
    torch.testing.assert_close(found, hidden, rtol=2**-10, atol=2**-10)  # kept in 16 bits: 11 of the mantissa
    assert not torch.equal(found[1], asked(images, cached).states(IMAGES)[1])  # another view


def test_each_view_is_run_once_and_depths_do_not_mix(world, tmp_path, monkeypatch):
    encoder, images, _ = world
    prepare(images, EncoderStates(encoder, 1, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(ImageEncoder, "entering", lambda *_: pytest.fail("run again"))
        again = EncoderStates(encoder, 1, tmp_path)
        assert prepare(images, again) == 0 and asked(images, again).states(IMAGES).shape == (4, 5, 24)
    assert prepare(images, EncoderStates(encoder, 2, tmp_path)) == 4


def test_texts_are_given_to_methods_that_run_the_layers_also_without_a_cache(world):
    text = world[2]
    rows = [text.tokens("the picture shows a red square"), text.tokens("this thing")]
    assert TextStates(text, 2, None).batch(rows) is None
    states = TextStates(text, 2, None, always=True).batch(rows)
    ids, mask = text.pad(rows)
    hidden = text.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(states[mask.bool()], hidden[mask.bool()])
    assert not states[~mask.bool()].any()


def test_the_identity_is_that_of_the_weights_before_a_method_changed_them(world):
    encoder = ImageEncoder(ImageConfig(name=world[0].config.name), world[0].config.name)
    before = encoder.identity()
    with torch.no_grad():
        next(encoder.model.parameters()).add_(1.0)
    assert encoder.identity() == before
