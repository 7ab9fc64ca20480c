"""A second text encoder: pooled as its own files say, the same alone and in any batch."""

import json
from dataclasses import dataclass

import pytest
import torch
from folders import bert_folder, llm_folder
from transformers import AutoModel

from mitrain.core.errors import ConfigError, DataError
from mitrain.data.texts import read_text
from mitrain.models.encoders import TextEncoder, TextEncoderConfig, encoder_of

TEXTS = ("the picture shows a red square", "this thing", "the red square shows this picture " * 4)


@dataclass
class Read:
    text: str
    where: str = "'a.txt'"


@pytest.fixture
def bert(tmp_path):
    return bert_folder(tmp_path / "bert", initializer_range=0.3)


def sentence(path, pooling: str, *more: str, longest: int = 20, lower: bool = False) -> None:
    """Writes the files of sentence-transformers."""
    (path / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}": name == pooling for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    types = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", *more)]
    (path / "modules.json").write_text(json.dumps([{"idx": i, "type": name} for i, name in enumerate(types)]))
    limits = {"max_seq_length": longest, "do_lower_case": lower}
    (path / "sentence_bert_config.json").write_text(json.dumps(limits))


def encoder(path, **settings) -> TextEncoder:
    return encoder_of(TextEncoderConfig(name=str(path), **settings), path)


def features(found: TextEncoder, *texts: str) -> torch.Tensor:
    return found.encode([found.preprocess(Read(text)) for text in texts])["pooled"]


def states(path, found: TextEncoder, text: str, layer: int = -1) -> torch.Tensor:
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        out = model(input_ids=found.preprocess(Read(text))[None], output_hidden_states=True)
    return out.hidden_states[layer][0]


@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens", "lasttoken"])
@pytest.mark.parametrize("more", [(), ("Normalize",)])
def test_its_own_files_say_how_a_sentence_is_pooled(bert, caplog, pooling, more):
    sentence(bert, pooling, *more)
    found = encoder(bert)
    hidden = states(bert, found, TEXTS[0])
    expected = {"cls_token": hidden[0], "mean_tokens": hidden.mean(0), "lasttoken": hidden[-1]}[pooling]
    expected = expected / expected.norm() if more else expected
    torch.testing.assert_close(features(found, TEXTS[0])[0], expected, atol=2e-6, rtol=1e-5)
    assert found.width == 32 and found.depth == 3 and found.family == "bert" and not caplog.text


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_a_feature_is_the_same_alone_and_in_any_batch(bert, pool):
    found = encoder(bert, pool=pool)
    alone = torch.cat([features(found, text) for text in TEXTS])
    rounding = 16 * torch.finfo(torch.float32).eps * float(alone.abs().max())
    torch.testing.assert_close(features(found, *TEXTS), alone, atol=rounding, rtol=0)
    torch.testing.assert_close(features(found, *TEXTS[::-1]), alone.flip(0), atol=rounding, rtol=0)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_an_inner_layer_is_read(bert, layer):
    found = encoder(bert, layer=layer, pool="mean")
    expected = states(bert, found, TEXTS[0], layer).mean(0)
    torch.testing.assert_close(features(found, TEXTS[0])[0], expected, atol=2e-6, rtol=1e-5)
    assert found.depth == 3 and len(found.model.encoder.layer) == layer


def test_a_causal_language_model_may_be_one(tmp_path):
    path = llm_folder(tmp_path / "llm")
    found = encoder(path, pool="last")
    expected = states(path, found, TEXTS[0])[-1]
    torch.testing.assert_close(features(found, TEXTS[1], TEXTS[0])[1], expected, atol=2e-6, rtol=1e-5)


def test_control_tokens_in_a_text_are_plain(bert):
    found = encoder(bert)
    ids = found.preprocess(Read("the [SEP] thing [CLS]")).tolist()
    assert ids[0] == 1 and ids[-1] == 2 and not {1, 2} & set(ids[1:-1])


def test_a_long_text_loses_its_end_which_is_said_once(bert, caplog):
    sentence(bert, "mean_tokens", longest=8)
    found = encoder(bert)
    ids = found.preprocess(Read(TEXTS[2]))
    assert len(ids) == 8 and ids[-1] == 2
    found.preprocess(Read(TEXTS[2]))
    assert caplog.text.count("reads the first 8 tokens of texts: 'a.txt' is longer") == 1
    caplog.clear()
    encoder(bert).preprocess(Read(TEXTS[0]))  # six words and two ends
    assert not caplog.text and len(encoder(bert, max_tokens=5).preprocess(Read(TEXTS[2]))) == 5


def test_lower_case_where_its_files_say_so(bert):
    sentence(bert, "mean_tokens", lower=True)
    found = encoder(bert)
    assert found.preprocess(Read("The RED square")).tolist() == found.preprocess(Read("the red square")).tolist()


def test_a_guess_of_the_pooling_is_said(bert, caplog):
    encoder(bert)
    assert "has no sentence-transformers files: its tokens' mean is taken" in caplog.text


@pytest.mark.parametrize(("pooling", "more"), [("max_tokens", ()), ("mean_tokens", ("Dense",))])
def test_another_pooling_is_refused_unless_one_is_set(bert, pooling, more):
    sentence(bert, pooling, *more)
    with pytest.raises(ConfigError, match="makes a sentence's vector by .*(max_tokens|Dense).*: set pool"):
        encoder(bert)
    assert encoder(bert, pool="cls").pool == "cls"


def test_the_identity_changes_with_what_is_computed(bert):
    first = encoder(bert).identity()
    assert encoder(bert).identity() == first and json.dumps(first)
    for changes in ({"pool": "cls"}, {"layer": 2}, {"max_tokens": 7}):
        assert encoder(bert, **changes).identity() != first
    assert encoder(bert).base()["weights"] == encoder(bert, pool="cls").base()["weights"]


def test_a_file_of_text_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa r\xc3\xa9d square\n")
    assert read_text(tmp_path, "a.txt").text == "a réd square\n"
    bad = {
        b"": "is empty",
        b" \n": "is empty",
        b"a\0b": "holds zero bytes",
        b"r\xe9d": "is no text in UTF-8 .byte 1.",
        b"\x89PNG\r\n": "is no text in UTF-8 .byte 0, it is a damaged PNG picture.",
        b"a" * (2 << 20): "has 2097152 bytes, 1048576 are allowed",
    }
    for content, words in bad.items():
        (tmp_path / "b.txt").write_bytes(content)
        with pytest.raises(DataError, match=f"'b.txt' .* {words}"):
            read_text(tmp_path, "b.txt")
