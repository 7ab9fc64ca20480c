"""Tokens that a tokenizer has and the model has no embedding for: harmless as padding, named in a text."""

import shutil

import pytest
import torch
from answers import FEATURES, make, samples
from modalities import pictures
from transformers import AutoTokenizer

from mitrain.core.errors import DataError, ModelError
from mitrain.data.formats.records import AnswerSample
from mitrain.models import TextBackbone
from mitrain.tasks.base import Batch
from mitrain.training.build import Model


def grown(folder, target, *plain, **special):
    """A copy whose tokenizer has more tokens than the model embeds."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(list(plain))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(target)
    return target


def test_padding_without_an_embedding_changes_nothing(folder, tmp_path):
    other = grown(folder, tmp_path / "pad", pad_token="[PAD]")
    plain, padded = make(folder), make(other)
    rows = len(plain.parts.text.model.get_input_embeddings().weight)
    assert padded.parts.text.tokenizer.pad_token_id == rows == padded.parts.text.vocabulary
    batch = Batch(samples(), pictures(FEATURES))  # of different lengths
    assert torch.equal(plain.loss(batch)[0], padded.loss(batch)[0])
    assert plain.generate(batch) == padded.generate(batch)


def test_a_token_in_a_text_is_named_with_its_sample(folder, tmp_path):
    task = make(grown(folder, tmp_path / "image", "<image>"))
    asked = [*samples(), AnswerSample("odd one", {"image": "i.png"}, "<image> is this red", "yes", ("yes", "no"))]
    with pytest.raises(DataError, match=r"'<image> is this red' has the token '<image>' \(id \d+\)"):
        task.texts(asked, True)
    model = Model(None, task.parts.text, [], task.parts.adapter, None, task, task.parts.states)
    with pytest.raises(DataError, match="sample 'odd one': the text .* embeds"):
        model.texts(asked, True)
    assert model.texts(samples(), True) == task.texts(samples(), True)


def test_a_special_token_is_plain_in_a_text_and_named_in_a_template(folder, tmp_path):
    other = grown(folder, tmp_path / "special", additional_special_tokens=["<image>"])
    assert make(other).texts([AnswerSample("0", {"image": "i.png"}, "<image> is this red", "yes", ("yes", "no"))], True)
    with pytest.raises(DataError, match="has the token '<image>'"):
        make(other, template="<image>{prompt}").texts(samples(), True)


def test_an_end_of_text_without_an_embedding_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match=r"ends texts with '<over>' \(id \d+\), and the language model embeds"):
        TextBackbone.load(grown(folder, tmp_path / "end", eos_token="<over>"), torch.float32)


def test_every_id_that_is_embedded_may_be_used(folder):
    text = TextBackbone.load(folder, torch.float32)
    last = text.tokenizer.convert_ids_to_tokens(text.vocabulary - 1)
    assert text.tokens(last) == [text.vocabulary - 1]
