"""Texts that are begun once and gone on from, by models that keep keys and values and by those that do not."""

import pytest
import torch
from tiny import COMMON, tiny
from tracked import Tracked
from transformers import AutoConfig, AutoModelForCausalLM

from mitrain.models import quant, text

OTHERS = {
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # its output holds no cache
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2},
}


@pytest.mark.parametrize(("name", "precision"), [("llama", "none"), ("llama", "int8"), ("gemma2", "none")])
def test_texts_are_begun_and_gone_on_from_as_they_are_read_whole(name, precision):
    """Of two texts of other lengths, one of which three answers follow, the first and the second token behind each."""
    model = tiny(name, dtype=torch.float32)  # of float64 Gemma 2 makes NaN where a whole row is hidden
    backbone = text.TextBackbone(model, None)
    if precision != "none":
        quant.quantise(model, precision, embedding=True)
    ids, mask = backbone.pad([[5, 6, 7, 8], [9, 10]], side="left")
    rows, firsts, seconds = torch.tensor([1, 0, 1, 1]), torch.tensor([4, 11, 66, 4]), torch.tensor([12, 0, 13, 14])
    with torch.no_grad():
        begun, found = backbone.begin(ids, mask, rows, firsts)
        place = torch.zeros_like(rows)
        given = (firsts[:, None], torch.ones(4, 1, dtype=torch.long), torch.arange(4), place, seconds)
        after = backbone.log_likelihood(*given, None, 0, begun.rows(rows))
        for n, row in enumerate(rows.tolist()):
            whole = torch.cat([ids[row][mask[row] > 0], firsts[n : n + 1]])[None]
            expected = model(input_ids=whole).logits[0].double().log_softmax(-1)
            torch.testing.assert_close(found[n].double(), expected[-2, firsts[n]], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after[n].double(), expected[-1, seconds[n]], rtol=1e-4, atol=1e-4)


def test_what_follows_a_text_is_not_held_for_each_of_its_answers():
    model = tiny("gemma2", dtype=torch.float32)
    backbone = text.TextBackbone(model, None)
    answers = torch.arange(3, 67).repeat(20)
    with torch.no_grad(), Tracked() as found:
        backbone.begin(*backbone.pad([[5, 6], [7, 8]], side="left"), answers % 2, answers)
    assert found.peak < 4 * 67 * len(answers) / 2


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_model_that_keeps_something_else_is_read_whole(kind, grad):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **OTHERS[kind]})).eval()
    backbone = text.TextBackbone(model, None)
    ids, mask = backbone.pad([[5, 6, 7, 8], [9, 10, 11, 12]], side="left")
    rows, positions, targets = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 66])
    with torch.set_grad_enabled(grad):
        found = backbone.log_likelihood(ids, mask, rows, positions, targets)
    expected = model(input_ids=ids, attention_mask=mask).logits[rows, positions].log_softmax(-1)[range(2), targets]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert backbone.begin(ids, mask, rows, targets) is None


def test_of_a_sliding_window_nothing_is_read_that_states_cannot_go_on_from():
    model, read = tiny("mistral"), []
    backbone = text.TextBackbone(model, None)
    ids, mask = backbone.pad([[5, 6, 7, 8]] * 4, side="left")
    states = backbone.model.get_input_embeddings()(ids)
    model.model.layers[-1].register_forward_hook(lambda *_: read.append(1))
    given = (ids, mask, torch.arange(4), torch.arange(4, 8))
    assert backbone.begin(*given, states, 1) is None and backbone.begin_alike(ids, mask, 1, torch.no_grad()) is None
    assert not read and backbone.begin(*given) is not None and read
