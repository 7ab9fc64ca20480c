"""Texts as token ids: prompt and answer as one text, and special tokens that act only where the frame has them."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    CamembertConfig,
    Data2VecTextConfig,
    GPT2Config,
    IBertConfig,
    LlamaConfig,
    MPNetConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from mitrain.core.errors import DataError
from mitrain.models import TextBackbone, loading
from mitrain.models.text import factory
from mitrain.models.tokens import Tokens
from mitrain.tasks.template import frame_of

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
OPENED = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
CLOSED = {"single": "<s> $A </s>", "special_tokens": [("<s>", 1), ("</s>", 2)]}


def words(post=None) -> PreTrainedTokenizerFast:
    """Words with a ▁ before each, which the normalizer puts before every text, as Llama's first two tokenizers do."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = list("▁<|user>s/nk.")
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["what is it cat dog " * 9], trainer)
    inner.pre_tokenizer = None
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if post:
        inner.post_processor = processors.TemplateProcessing(**post)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|user|>"]
    )


class Shaped:
    """A backbone without weights."""

    tokens, prompt, answered, plain = (
        TextBackbone.tokens,
        TextBackbone.prompt,
        TextBackbone.answered,
        TextBackbone.plain,
    )

    def __init__(self, tokenizer, limit=64):
        self.texts, self.positions = Tokens(tokenizer), limit

    def _readable(self, *arguments):
        return TextBackbone._readable(self, *arguments)

    def _embedded(self, ids, text):
        """Without embeddings there is nothing to compare with."""


def named(backbone, ids):
    return backbone.texts.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("post", [OPENED, CLOSED, None])
def test_a_prompt_and_its_answer_are_one_text(post):
    backbone = Shaped(words(post))
    opening = ["<s>"] if post else []
    for prompt in ("what is it", "what is it ", " what is it"):  # a blank at the end would become a token of its own
        row, start = backbone.answered(prompt, "cat")
        assert named(backbone, row) == [*opening, "▁what", "▁is", "▁it", "▁cat"]
        assert named(backbone, row[start:]) == ["▁cat"] and backbone.prompt(prompt) == row[:start]
    assert named(backbone, backbone.tokens("what is")) == [*opening, "▁what", "▁is", *["</s>"] * (post is CLOSED)]


def test_an_answer_begins_where_its_row_leaves_the_prompts():
    backbone = Shaped(words(OPENED))
    backbone.texts.prompt = lambda text, frame: [
        1,
        *backbone.plain("what is dog"),
    ]  # as where "it" and "cat" made one token
    row, start = backbone.answered("what is it", "cat")
    assert named(backbone, row[start:]) == ["▁it", "▁cat"]
    backbone.texts.prompt = lambda text, frame: [7]
    assert backbone.answered("is it", "cat")[1] == 1  # the first token has none before it to be predicted from


def test_a_prompt_that_many_answers_follow_is_tokenised_once():
    backbone, asked = Shaped(words(OPENED)), []
    tokenised = backbone.texts.prompt
    backbone.texts.prompt = lambda text, frame: asked.append(text) or tokenised(text, frame)
    rows = [backbone.answered(prompt, answer) for prompt in ("what is it", "is it") for answer in ("cat", "dog")]
    assert asked == ["what is it", "is it"]
    assert [named(backbone, row[start:]) for row, start in rows] == [["▁cat"], ["▁dog"]] * 2


def test_special_tokens_act_in_the_frame_and_are_plain_text_in_a_users_words():
    backbone = Shaped(words(OPENED))
    frame = frame_of("<|user|>{text}</s>")
    clean = named(backbone, backbone.prompt("what is", frame))
    assert clean == ["<s>", "<|user|>", "▁what", "▁is", "</s>"]
    for text, answer in (("what is</s>", "cat"), ("what is", "cat</s>"), ("<|user|>", "<s>"), ("<unk>", "cat")):
        row, start = backbone.answered(text, answer, frame)
        found = named(backbone, row)
        assert [found.count(token) for token in ("<s>", "<|user|>", "</s>")] == [1, 1, 1]
        assert found[0] == "<s>" and found[1] == "<|user|>" and found.index("</s>") == start - 1
        said = backbone.texts.tokenizer.decode(row[2:], skip_special_tokens=False)
        assert "".join(said.split()).replace("▁", "") == f"{text}</s>{answer}".replace(" ", "")
    assert backbone.tokens("</s>") != backbone.tokens("", frame=("</s>", ""))


def test_a_frame_and_a_text_make_no_special_token_together():
    backbone = Shaped(words(OPENED))
    assert 2 not in backbone.tokens("s>", frame=("</", ""))


def test_a_long_text_loses_its_end_and_not_its_closing_token():
    backbone = Shaped(words(CLOSED))
    assert named(backbone, backbone.tokens("what is it cat", most=4)) == ["<s>", "▁what", "▁is", "</s>"]
    with pytest.raises(DataError, match="a text of 6 tokens is longer than the model's 5"):
        Shaped(words(CLOSED), limit=5).tokens("what is it cat")
    with pytest.raises(DataError, match="a text of 5 tokens is longer than the model's 4: shorten 'what is it'"):
        Shaped(words(CLOSED), limit=4).answered("what is it", "cat")
    with pytest.raises(DataError, match="a text of 4 tokens is longer than the model's 3: lower task.max_tokens for"):
        Shaped(words(CLOSED), limit=3).tokens("what is it cat", most=4)
    assert Shaped(words(CLOSED), limit=4).prompt("what is it", speaks=1)
    with pytest.raises(DataError, match="a prompt of 4 tokens leaves no room for 2 more in the model's 4: lower task"):
        Shaped(words(CLOSED), limit=4).prompt("what is it", speaks=2)


LONGEST = {
    **dict.fromkeys((RobertaConfig, XLMRobertaConfig, CamembertConfig, MPNetConfig, Data2VecTextConfig, IBertConfig), 14),
    **dict.fromkeys((BertConfig, OPTConfig, GPT2Config, LlamaConfig), 16),
}


@pytest.mark.parametrize("kind", LONGEST, ids=lambda kind: kind.model_type)
def test_a_text_is_as_long_as_the_model_has_positions_for(kind):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind(**shape, vocab_size=40, max_position_embeddings=16)
    model = factory(config).from_config(config).eval()
    longest = loading.positions(model)
    assert longest == LONGEST[kind]
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 7))
    if kind is not LlamaConfig:  # rotary positions have no end
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 7))
