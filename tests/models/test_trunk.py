"""The frozen trunk: computed once, replayed, equal to the whole model for every architecture."""

import pytest
import torch
from tiny import DEPTH, NAMES, text, tiny

from mitrain.models.frozen import replay, trunk_states


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [1, 2, DEPTH])
def test_replaying_equals_the_whole_model(name, depth):
    # transformers' eager softmax runs in float32, where float64's mask value is -inf: a fully masked row is NaN
    dtype, tolerance = (torch.float32, 1e-5) if name == "gemma2" else (torch.float64, 1e-12)
    model, inputs = tiny(name, dtype), text(padding="right")
    with torch.no_grad():
        whole = model(**inputs, use_cache=False).logits
        states = trunk_states(model, depth, **inputs)
        with replay(model, depth, states):
            part = model(inputs_embeds=states, attention_mask=inputs["attention_mask"], use_cache=False).logits
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(part[shown], whole[shown], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_the_hidden_states_of_the_whole_model(name):
    model, inputs = tiny(name, torch.float64), text()
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    for depth in range(DEPTH):
        torch.testing.assert_close(trunk_states(model, depth, **inputs), hidden[depth], rtol=0, atol=1e-12)


def test_the_layers_below_do_not_run_and_the_model_is_restored():
    model, inputs = tiny(), text()
    before = list(model.model.layers)
    ran = []
    for i, layer in enumerate(before):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    states = trunk_states(model, 2, **inputs)
    assert ran == [0, 1]
    with pytest.raises(RuntimeError, match="stop"), replay(model, 2, states):
        model(inputs_embeds=states, attention_mask=inputs["attention_mask"], use_cache=False)
        raise RuntimeError("stop")
    assert ran == [0, 1, 2, 3] and list(model.model.layers) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
