"""What `answer` and `caption` have in common: text from the frozen language head, behind a prompt.

The prompt is text alone; the picture can reach the words only through the infusion.

Shapes: B samples, R rows (a prompt and what follows it), T tokens, V vocabulary.
"""

import contextlib
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache, partial
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mitrain.core.config import Section, parse
from mitrain.core.errors import ConfigError, ModelError
from mitrain.core.user_code import FunctionName
from mitrain.models import release
from mitrain.models.batch import ModalityInputs
from mitrain.models.begun import Begun
from mitrain.models.tokens import TextOrTurns
from mitrain.tasks.base import Batch, Given, Parts, Task
from mitrain.tasks.chat import earlier_turn, in_chat
from mitrain.tasks.generation import decoding, generated
from mitrain.tasks.template import frame_of

log = logging.getLogger(__name__)


class LanguageConfig(Section):
    """What tasks have whose text the language head says."""

    template: str
    chat: bool = False
    system: str = ""
    max_new_tokens: int = Field(8, ge=1, le=512)
    beams: int = Field(1, ge=1, le=64)
    length_penalty: float = Field(1.0, ge=-10, le=10)
    temperature: float = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    metric: FunctionName | None = None

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if self.temperature and self.beams > 1:
            raise ValueError("beams search for the likeliest text and temperature draws one: set one of them")
        if self.top_p < 1 and not self.temperature:
            raise ValueError("top_p cuts what is drawn from: set temperature, too")
        if self.system and not self.chat:
            raise ValueError("system is a part of the chat template: set chat=true, too")
        if self.length_penalty != 1 and self.beams == 1:
            raise ValueError("length_penalty chooses among beams: set beams, too")
        return self

    def options(self) -> dict[str, Any]:
        """Keywords for `generated`."""
        if self.temperature:
            drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        else:
            drawn = {"length_penalty": self.length_penalty} if self.beams > 1 else {}
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.beams, **drawn}


LARGE_CACHE = 2**30
"""Bytes of a KV cache beyond which prompts are rather read again for each of their answers."""


class LanguageTask(Task):
    """loss = − Σ_t log p(text_t | prompt, text_<t, image) over the tokens behind the prompt and the end."""

    speaks = True
    hear: Callable[[str], None] | None = None
    """Is told, piece by piece, what the model says of a sample that is asked about alone."""

    def __init__(self, config: Any, parts: Parts):
        super().__init__(parts)
        self.config, frame = config, cache(partial(frame_of_turns, config.template, getattr(config, "turn", "")))
        self._prompt_ids = cache(lambda words, speaks: parts.text.prompt(words, frame(count(words)), speaks))
        self._answered = lru_cache(1 << 17)(lambda words, answer: parts.text.answered(words, answer, frame(count(words))))

    @classmethod
    def build(cls, config: Any, given: Given) -> "LanguageTask":
        text, adapter = given.parts.text, given.parts.adapter
        if not getattr(given.data, "texts", True):
            raise ConfigError("data.texts=false: there is no text to learn: take the task retrieve, or leave it out")
        if not text.speaks:
            name = type(text.model).__name__
            raise ConfigError(f"model.llm is a {name}, which has no language head to answer with: take another task")
        alone = adapter.traits.backbones == ("text",) or adapter.traits.conditions_text
        if adapter.traits.runs_layers or adapter.traits.wraps_text_model or not alone:
            raise ConfigError(
                f"the method {adapter.traits.name!r} does not work through the language head: take another task"
            )
        if config.chat and text.tokenizer is not None:
            config = chatting(config, text.tokenizer, str(text.source))
        return cls(config, given.parts)

    def pair(self, sample: Any) -> tuple[TextOrTurns, str]:
        """What a sample says to the model, its prompt or its turns, and what training says behind it."""
        raise NotImplementedError

    def prompt_ids(self, words: TextOrTurns) -> list[int]:
        """DataError where what the model may say would not fit behind them."""
        return self._prompt_ids(words, self.config.max_new_tokens)

    def row(self, prompt: TextOrTurns, answer: str) -> list[int]:
        """Token ids of a prompt with an answer, without the end, which predicts nothing."""
        return self._answered(prompt, answer)[0]

    def order(self, samples: Sequence[Any]) -> list[int]:
        """Those with the same prompt together: little padding, and answers of about the same length."""
        words = [self.pair(s)[0] for s in samples]
        prompts = [said if isinstance(said, str) else "\n".join(said) for said in words]
        return sorted(range(len(samples)), key=lambda i: (len(prompts[i]), prompts[i]))

    def tokens(self, samples: Sequence[Any]) -> int:
        return sum(len(self.row(*self.pair(s))) for s in samples)

    def log_likelihood(
        self, pairs: Sequence[tuple[TextOrTurns, str]], inputs: ModalityInputs | None, begun: Begun | None = None
    ) -> list[Tensor]:
        """log p of each answer's tokens (its end included) for each (prompt, answer), with R rows of ``inputs``.

        ``begun``: the R prompts, where they are read already (`beginnings`), which tells of the first tokens.
        """
        text, states = self.parts.text, self.parts.states
        rows, starts = zip(*(self._answered(*pair) for pair in pairs), strict=True)
        below = states.batch(rows)
        if begun is not None:
            below = parts_of(below, [slice(start, len(row)) for row, start in zip(rows, starts, strict=True)], "right")
            rows, starts = [row[start:] for row, start in zip(rows, starts, strict=True)], [1] * len(rows)
        answers = [[*row[start:], text.tokenizer.eos_token_id] for row, start in zip(rows, starts, strict=True)]
        ids, mask = text.pad(rows)
        spans = [range(start - 1, len(row)) for row, start in zip(rows, starts, strict=True)]
        row_index = torch.tensor([r for r, span in enumerate(spans) for _ in span], device=ids.device)
        positions = torch.tensor([p for span in spans for p in span], device=ids.device)
        targets = torch.tensor([token for answer in answers for token in answer], device=ids.device)
        with self.parts.adapter.conditioned(inputs):
            picked = text.log_likelihood(ids, mask, row_index, positions, targets, below, states.depth, begun)
        return list(picked.split([len(answer) for answer in answers]))

    @property
    def could_begin(self) -> bool:
        """Whether prompts behind which several answers stand could be read once: by a model that is told positions."""
        return self.parts.text.goes_on and not self.parts.text.sharded

    @cached_property
    def begins(self) -> bool:
        """Whether they are: by a model that goes on from its KV cache as it does from the text."""
        try:
            return self.could_begin and not self.decoding
        except ModelError:  # a method that cannot generate, as a gate over whole sequences
            return False

    @torch.no_grad()
    def beginnings(
        self, pairs: Sequence[tuple[TextOrTurns, str]], inputs: ModalityInputs | None, owner: Sequence[int], most: int
    ) -> tuple[Begun, Tensor, Tensor] | None:
        """The prompts of ``pairs``, each read once, which of them is each pair's, and log p of the pairs' first tokens.

        ``owner``: the rows of ``inputs`` that the pairs are for. None where nothing is spared by it, or where the cache of
        ``most`` pairs would hold more than `LARGE_CACHE` bytes.
        """
        if not self.begins:
            return None
        heads, whole, firsts = [], {}, []
        for sample, pair in zip(owner, pairs, strict=True):
            row, start = self._answered(*pair)
            heads.append((sample, *row[:start]))
            whole.setdefault(heads[-1], row)
            firsts += row[start : start + 1]
        places = {head: place for place, head in enumerate(whole)}
        if len(places) == len(pairs) or min(map(len, places)) < 2 or len(firsts) < len(pairs):
            return None
        text, states = self.parts.text, self.parts.states
        samples = torch.tensor([sample for sample, *_ in places])
        below = parts_of(states.batch(list(whole.values())), [slice(len(head) - 1) for head in places], "left")
        ids, mask = text.pad([head for _, *head in places], side="left")
        which = torch.tensor([places[head] for head in heads], device=ids.device)
        targets = torch.tensor(firsts, device=ids.device)
        with self.parts.adapter.conditioned(inputs and inputs.rows(samples.to(inputs.device))):
            read = text.begin(ids, mask, which, targets, below, states.depth)
        if read is None or most * read[0].bytes > LARGE_CACHE * len(places):
            return None
        return read[0], which, read[1]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        likelihood = torch.cat(self.log_likelihood([self.pair(s) for s in batch.samples], batch.inputs))
        return -likelihood.sum(), torch.tensor(float(likelihood.numel()), dtype=torch.float64)

    @cached_property
    def decoding(self) -> dict[str, Any]:
        return decoding(self.parts)

    def rehearse(self, samples: Sequence[Any]) -> None:
        try:
            with release.passing(self.parts.text.model):
                self.decoding  # noqa: B018
        except ModelError as error:
            if self.must_generate(samples):
                raise
            log.warning("this run will not be able to generate (predict, eval --generate): %s", error)

    @torch.no_grad()
    def spoken(self, samples: Sequence[Any], inputs: ModalityInputs | None) -> list[tuple[str, bool]]:
        """What the model says of each sample on its own, and whether all its logits were numbers.

        Drawn words depend on the samples alone, not on what was drawn before, nor by which rank.
        """
        text, states, numbers = self.parts.text, self.parts.states, Numbers(len(samples))
        ids, mask = text.pad([self.prompt_ids(self.pair(s)[0]) for s in samples], side="left")
        devices = [ids.device] if ids.device.type == "cuda" else []
        read = None
        if self.begins and states.cached and self.config.beams == 1 and ids.shape[1] > 1:
            read = text.begin_alike(ids[:, :-1], mask[:, :-1], states.depth, self.parts.adapter.conditioned(inputs))
        with self.parts.adapter.conditioned(inputs, copies=self.config.beams), torch.random.fork_rng(devices):
            torch.manual_seed(zlib.crc32(samples[0].id.encode()))
            options = {**self.config.options(), **self.decoding, **({} if read is None else {"past_key_values": read})}
            if self.hear and len(samples) == 1 and self.config.beams == 1 and self.must_generate(samples):
                options["streamer"] = Heard(text.tokenizer, self.hear)
            out = generated(self.parts, ids, mask, logits_processor=[numbers], **options)
        said = text.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return list(zip([words.strip() for words in said], numbers.all, strict=True))


def parts_of(states: Tensor | None, spans: Sequence[slice], side: str) -> Tensor | None:
    """Of each row of ``states`` (B, T, D) the tokens of its span, padded with zeros on ``side``."""
    if states is None:
        return None
    return pad_sequence([row[span] for row, span in zip(states, spans, strict=True)], batch_first=True, padding_side=side)


def told_to_speak(task: Task, given: Mapping[str, Any]) -> Any:
    """The settings of ``task`` with those ``given``, by which it speaks; ConfigError for what it cannot take."""
    if given and not task.speaks:
        raise ConfigError(
            f"{', '.join(given)} say how text is generated, which only the tasks 'answer' and 'caption' do: leave them out"
        )
    return parse(type(task.config), {**task.config.to_dict(), **given}) if given else getattr(task, "config", None)


@contextlib.contextmanager
def speaking(task: Task, given: Mapping[str, Any], hear: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside, ``task`` speaks by the settings ``given`` in place of the run's, and ``hear`` is told what it says."""
    if not given and hear is None:
        yield
        return
    before, task.config, task.hear = task.config, told_to_speak(task, given), hear
    try:
        yield
    finally:
        task.config, task.hear = before, None


def chatting(config: LanguageConfig, tokenizer: Any, name: str) -> LanguageConfig:
    """The settings with the chat template written out, so that a run says itself what the model was told."""
    update: dict[str, Any] = {"template": in_chat(config.template, config.system, tokenizer, name)}
    if hasattr(config, "turn"):
        try:
            update["turn"] = earlier_turn(config.template, config.system, tokenizer, name)
        except ConfigError as error:
            log.warning("what was said before a question stands before it as lines of text: %s", error)
    return config.model_copy(update={**update, "chat": False, "system": ""})


def count(words: TextOrTurns) -> int:
    """How many earlier questions and answers there are before the question now."""
    return 0 if isinstance(words, str) else len(words) // 2


def frame_of_turns(template: str, turn: str, earlier: int) -> tuple[str, ...]:
    """`frame_of` of a ``template`` with as many ``turn``s before its field."""
    head, *rest = frame_of(template)
    if not earlier:
        return (head, *rest)
    before, between, behind = frame_of(turn)
    middle = [part for _ in range(earlier - 1) for part in (between, behind + before)]
    return (head + before, *middle, between, behind, *rest)


class Numbers:
    """A logits processor that changes nothing and notes for which of ``rows`` samples all logits were numbers."""

    def __init__(self, rows: int):
        self.all = [True] * rows

    def __call__(self, _ids: Tensor, logits: Tensor) -> Tensor:
        broken = logits.isnan().reshape(len(self.all), -1).any(1).tolist()  # −inf forbids a token, NaN is none
        self.all = [good and not bad for good, bad in zip(self.all, broken, strict=True)]
        return logits


class Heard:
    """A streamer of transformers' ``generate`` for one row: ``tell`` gets each piece of text that no later token changes."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]):
        self.tokenizer, self.tell, self.ids, self.told = tokenizer, tell, None, ""

    def put(self, ids: Tensor) -> None:
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()
        # Held back: half a character, and blanks at the end, which an answer does not have.
        if len(text) > len(self.told) and text.startswith(self.told) and not text.endswith("\ufffd"):
            self.tell(text[len(self.told) :])
            self.told = text

    def end(self) -> None:
        """Nothing is held back that would be told."""
