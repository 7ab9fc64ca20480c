"""The table of Hugging Face layouts: each row's names are there, and mean what the row says."""

import pytest
from tiny import NAMES, tiny
from tiny_encoders import IMAGES, SOUNDS, TEXTS, tiny_encoder

from mitrain.models.layouts import ENCODERS, LAYOUTS, LLAMA, PROJECTIONS, attention_of, kind_of, layers_of, makes


@pytest.mark.parametrize("name", [*NAMES, *TEXTS, *IMAGES, *SOUNDS])
def test_each_row_names_what_is_there(name):
    layer = layers_of(tiny(name) if name in NAMES else tiny_encoder(name))[1]
    layout = LAYOUTS.get(name, LLAMA)
    assert attention_of(layer) is getattr(layer, layout.attention)
    there = {path for path, _ in layer.named_modules()}
    for kind in PROJECTIONS[:4]:
        if path := getattr(layout, kind):
            assert f"{layout.attention}.{path}" in there and makes(f"{layout.attention}.{path}") == (kind,)
    if layout.qkv:
        assert f"{layout.attention}.{layout.qkv}" in there and makes(layout.qkv) == ("q", "k", "v")
    for path in layout.mlp:
        assert path in there and kind_of(path) == "mlp"


def test_the_encoders_are_those_whose_layers_are_tested_one_by_one():
    assert set(ENCODERS) == {*TEXTS, *IMAGES, *SOUNDS}
