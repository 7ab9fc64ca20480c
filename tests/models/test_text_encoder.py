"""Encoders such as BERT as text models: how they are told, loaded and read, and MiT on them."""

import json

import pytest
import torch
from folders import bert_folder
from tiny import features, scramble
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.mit.mit import MiT, MiTConfig
from mitrain.models import TextBackbone
from mitrain.models.text import factory, read_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("bert"))


def texts(text):
    return text.pad([text.tokens("the picture shows a red square"), text.tokens("this thing")])


def test_an_encoder_is_told_from_a_decoder():
    assert factory(BertConfig()) is AutoModel
    assert factory(BertConfig(is_decoder=True)) is AutoModelForCausalLM and factory(LlamaConfig()) is AutoModelForCausalLM


def test_it_is_loaded_without_a_head_and_its_separator_ends_a_text(folder):
    text = TextBackbone.load(folder, torch.float32)
    assert type(text.model) is BertModel and not text.speaks and text.depth == 3 and text.width == 32
    assert text.tokenizer.eos_token == "[SEP]"
    assert text.tokens("this thing")[0] == 1 and text.tokens("this thing")[-1] == 2
    assert type(TextBackbone.empty(text.model.config).model) is BertModel


@pytest.mark.parametrize("name", ["BertTokenizer", "LlamaTokenizer", "T5Tokenizer", "XLMRobertaTokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(folder, tmp_path, name):
    assert len(read_tokenizer(folder)) > 20
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(ModelError, match="knows special tokens only: put its tokenizer.json"):
        read_tokenizer(tmp_path)


def test_texts_that_the_tokenizer_does_not_know_are_told(folder, caplog):
    text = TextBackbone.load(folder, torch.float32)
    text.tell_unknown([text.tokens("this thing"), text.tokens("the picture shows a red square"), text.tokens("猫")])
    assert not caplog.text
    text.tell_unknown([text.tokens("this thing"), text.tokens("猫 犬 鳥")])
    assert "33 % of the texts' tokens are unknown ([UNK]) to the tokenizer of " in caplog.text


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_trunk_is_replayed(folder, depth):
    text = TextBackbone.load(folder, torch.float32)
    ids, mask = texts(text)
    whole = text.hidden(ids, mask)
    rows = [text.tokens("the picture shows a red square"), text.tokens("this thing")]
    states = torch.zeros(2, ids.shape[1], 32)
    for row, part in zip(states, text.trunk(rows, depth), strict=True):
        row[: len(part)] = part
    torch.testing.assert_close(text.hidden(ids, mask, states, depth)[mask.bool()], whole[mask.bool()])


def test_mit_starts_as_the_frozen_encoder_and_then_sees(folder):
    text = TextBackbone.load(folder, torch.float32)
    ids, mask = texts(text)
    frozen = text.hidden(ids, mask)
    adapter = MiT(MiTConfig(modalities={"image": 6}, layers=[1, 2], gate="sequence"))
    adapter.attach({"text": text.model})
    with adapter.bind({"image": features(2)}):
        torch.testing.assert_close(text.hidden(ids, mask)[mask.bool()], frozen[mask.bool()])
    scramble(adapter)
    with adapter.bind({"image": features(2)}):
        own = text.hidden(ids, mask)
    with adapter.bind({"image": features(2, seed=9)}):
        other = text.hidden(ids, mask)
    assert not torch.allclose(own[mask.bool()], other[mask.bool()], atol=1e-3)
    own[mask.bool()].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    with adapter.bind({"image": features(1, seed=2)}):  # alone, without padding, it reads the same
        alone = text.hidden(ids[1:, : int(mask[1].sum())], mask[1:, : int(mask[1].sum())])
    with adapter.bind({"image": features(2, seed=2)[[0, 0]]}):
        both = text.hidden(ids, mask)
    torch.testing.assert_close(alone[0], both[1][mask[1].bool()], rtol=1e-4, atol=1e-5)
    adapter.detach()
    torch.testing.assert_close(text.hidden(ids, mask), frozen)


def test_a_gate_that_reads_the_text_so_far_is_refused(folder):
    text = TextBackbone.load(folder, torch.float32)
    with pytest.raises(ConfigError, match=r"an encoder reads its text both ways, .* set adapter.gate=sequence"):
        MiT(MiTConfig(modalities={"image": 6}, layers=[1])).attach({"text": text.model})
