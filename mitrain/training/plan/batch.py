"""The batch of a plan's step: the longest training samples where data and tokenizer are at hand, else stand-ins."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mitrain.core import hub, prepared
from mitrain.core.errors import UserError
from mitrain.data import sources
from mitrain.data.expressions import ExpressionsConfig, RefcocoConfig
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.formats.labels import LabelSample
from mitrain.data.formats.records import AnswerSample
from mitrain.data.formats.refcoco import ReferSample
from mitrain.data.formats.targets import TargetSample
from mitrain.data.sources import limit, portion
from mitrain.models.batch import ModalityInputs
from mitrain.tasks.base import Batch
from mitrain.training.build import Model
from mitrain.training.schema import RunConfig

SIDE = 64  # pixels of a stand-in's mask
LOOKED_AT = 20_000
"""Samples, evenly spread, among which the longest are looked for: counting tokens takes microseconds a sample."""
SAID = 8  # a stand-in's answer is one token in so many


class WordTokenizer:
    """Stands in for a tokenizer that is not at hand: a word is a token."""

    eos_token_id, pad_token_id, unk_token_id, word = 1, 1, None, 2
    added_tokens_decoder: dict[int, Any] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.word] * len(text.split())}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return words(len(ids))


def words(count: int) -> str:
    return " ".join(["w"] * count)


def at_hand(config: RunConfig) -> tuple[Sequence[Any], Sequence[Any], str]:
    """The samples of training and of val, where the data's folder is there already; else none, and why."""
    folder = data_folder(config)
    if folder is None:
        return [], [], "the data is not at hand"
    try:
        train, val = (config.data.read(folder, split) for split in ("train", "val"))
        return portion(train, config.train.fraction), limit(val, config.train.eval_samples), ""
    except UserError as error:
        return [], [], f"the data cannot be read ({error})"


def data_folder(config: RunConfig) -> Path | None:
    data = config.data
    if data.source is None:
        return folder if (folder := Path(data.root).expanduser()).is_dir() else None
    if data.source.startswith(hub.PREFIX):
        return None
    recipe = prepared.find("data", data.source)
    folder = prepared.folder_of("data", recipe, data.source_seed)
    return folder if prepared.is_ready(recipe, folder, None) else None


def stand_in(model: Model, number: int, tokens: int) -> Any:
    """A sample of the model's data with a text of about ``tokens`` tokens."""
    data, name = model.config.data, str(number)
    inputs = {key: f"{key}{number}" for key in data.inputs}
    said = max(1, tokens // SAID)
    if isinstance(data, sources.ClassSection):
        return LabelSample(name, inputs, words(tokens), tuple(model.task.classes[:1]))
    if isinstance(data, sources.TargetSection):
        return TargetSample(name, inputs, words(tokens), 0.0)
    if isinstance(data, sources.CaptionSection):
        return CaptionSample(name, inputs, f"{words(tokens - 1)} {number}")  # two alike would be right for each other
    if isinstance(data, RefcocoConfig | ExpressionsConfig):
        everything = {"size": [SIDE, SIDE], "counts": [0, SIDE * SIDE]}
        return ReferSample(name, inputs, words(tokens), (SIDE, SIDE), everything)
    return AnswerSample(name, inputs, words(tokens - said), words(said))


def longest(samples: Sequence[Any], tokens: Callable[[Sequence[Any]], int], count: int) -> list[Any]:
    """The ``count`` samples of most tokens, of many of `LOOKED_AT`, repeated where there are fewer."""
    ordered = sorted(limit(samples, LOOKED_AT), key=lambda sample: -tokens([sample]))
    return [ordered[i % len(ordered)] for i in range(count)]


def largest_batch(samples: Sequence[Any], tokens: Callable[[Sequence[Any]], int], size: int) -> Sequence[Any]:
    """Of the batches in which ``samples`` are scored, of many of some, the one of most tokens."""
    every = range(0, len(samples), size)
    starts = {*limit(every, max(1, LOOKED_AT // size)), *every[-2:]}  # the longest may stand last, the last one be short
    return max((samples[start : start + size] for start in starts), key=tokens)


def batch_of(model: Model, samples: Sequence[Any], mode: FakeTensorMode) -> Batch:
    """``samples`` with features and states of the right shapes; the text states' cache answers in the same way."""
    dtype, count = model.text.dtype, len(samples)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype, device="cpu")

    states, kept = model.states, model.config.cache and model.states.depth > 0

    def text_states(rows: Sequence[Sequence[int]]) -> Tensor:
        if not kept:
            model.text.trunk(rows, states.depth)
        return empty(len(rows), max(map(len, rows)), model.text.width)

    if kept or states.always:
        states.batch = text_states
    features = {name: empty(count, width) for name, width in model.norm.widths.items()}
    entering, depth, changed = None, 0, ""
    if model.entering is not None:
        first = next(iter(model.encoders.values()))
        entering, depth = empty(count, first.tokens, model.entering.width), model.entering.depth
        changed = next(iter(model.norm.widths))
    seeing = [encoder for encoder in model.encoders.values() if model.task.decodes for _ in encoder.config.levels]
    levels = [empty(count, e.prefix_tokens + e.grid**2, e.level_width, dtype=torch.float32) for e in seeing]
    return Batch(list(samples), ModalityInputs(features, {}, entering, depth, changed), levels)
