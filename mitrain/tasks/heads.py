"""What `classify` and `regress` have in common: a linear head (or a small MLP) on read-outs of the adapted backbones.

The text runs through the language model, the other modalities reach it through the infusion; a head reads the final state.

Shapes: B samples.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mitrain.core import user_code
from mitrain.core.config import Section
from mitrain.core.errors import ConfigError
from mitrain.data.columns import different
from mitrain.models.batch import ModalityInputs
from mitrain.models.tokens import SPARE
from mitrain.tasks.base import Batch, Parts, Splits, Task
from mitrain.tasks.probe import standardised
from mitrain.tasks.readout import See, evenly, frozen_states, read_out, runs_text, statistics, width_of
from mitrain.tasks.template import frame_of, template_with


class HeadConfig(Section):
    """What tasks have whose head reads states. A ``template`` without {text} leaves the text out; with a modality's vector
    itself in ``readout``, by its name, they fuse late."""

    template: template_with("text", required=False) = "{text}"
    readout: tuple[str, ...] = Field(("last",), min_length=1)
    hidden: int = Field(0, ge=0, le=1 << 16)
    max_tokens: int = Field(128, ge=1, le=1 << 20)
    dropout: float = Field(0.0, ge=0, lt=1)
    metric: user_code.FunctionName | None = None


class ReadTask(Task):
    """Base of the tasks that read the adapted backbones' states: the read-outs ``config.readout``, standardised."""

    def tokens(self, samples: Sequence[Any]) -> int:
        return sum(len(self._ids(s.text)) for s in samples)

    def states(self, texts: Sequence[str], inputs: ModalityInputs | None) -> Tensor:
        """(B, widths of the read-outs): what the head reads, standardised per dimension; 0 of a modality that is lacking."""
        names = self.config.readout
        parts = read_out(self.parts, [self._ids(text) for text in texts], names, inputs)
        values = (torch.cat([parts[name] for name in names], -1) - self.mean) * self.scale
        if inputs is None or inputs.lacking is None or inputs.changed not in names:
            return values
        there = [~inputs.lacking[:, None] | (name != inputs.changed) for name in names]
        return values * torch.cat([mask.expand(parts[name].shape) for name, mask in zip(names, there, strict=True)], -1)


class HeadTask(ReadTask):
    """Base of the tasks that predict W x + b, x the standardised read-outs; with ``hidden`` W GELU(V x + c) + b."""

    texts_apart = "text"
    reads_no_text = True

    def __init__(self, config: HeadConfig, parts: Parts, outputs: int, widths: Mapping[str, int]):
        super().__init__(parts)
        self.config, self.frame, self.widths = config, frame_of(config.template), dict(widths)
        width = sum(width_of(parts, name, widths) for name in config.readout)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        inner = config.hidden
        layers = [nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, outputs)] if inner else []
        self.head = nn.Sequential(*layers) if inner else nn.Linear(width, outputs)
        self.dropout = nn.Dropout(config.dropout)
        self._ids = lru_cache(1 << 17)(self._row)

    @cached_property
    def _around(self) -> int:
        """Tokens of the template alone."""
        return len(self.parts.text.tokens("", frame=self.frame, strip=None))

    def _row(self, text: str) -> list[int]:
        """Token ids of a filled template; a text that is too long loses its end, the template nothing."""
        backbone, tokenizer = self.parts.text, self.parts.text.tokenizer
        longest = max(1, self.config.max_tokens - self._around)
        # A tokenizer makes no more tokens than letters of ASCII, but for a few around them: most texts are short enough.
        if not (text.isascii() and len(text) + SPARE <= longest):
            ids = backbone.plain(text)
            if len(ids) > longest:
                text = tokenizer.decode(ids[:longest], skip_special_tokens=True)
        row = backbone.tokens(text, frame=self.frame, strip=None)
        return row or [tokenizer.eos_token_id]  # the head needs a token to read

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        if not runs_text(self.config.readout):
            return []
        return [self._ids(text) for text in sorted(different(samples, "text"))]

    @torch.no_grad()
    def fit(self, samples: Sequence[Any], see: See | None = None) -> None:
        """Mean and standard deviation of the read-outs over the training samples."""
        rows = [self._ids(text) for text in evenly(sorted(different(samples, "text")))]
        own = lambda sample: self._ids(sample.text)  # noqa: E731
        names = self.config.readout
        mean, scale = statistics(self.parts, names, self.widths, rows, samples, see, own)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def frozen_views(self, splits: Splits) -> dict[str, list[np.ndarray]]:
        """What a baseline may read, by its name in a table, of the training, validation and asked samples (n, width) each:
        the features that are infused and, where texts differ, the frozen language model's states, and both."""
        views = {"the same features": [splits.features(part).numpy() for part in splits.parts]} if self.widths else {}
        rows = [[self._ids(s.text) for s in part] for part in splits.parts]
        if len({tuple(row) for row in rows[0]}) > 1:
            states = standardised([frozen_states(self.parts, part) for part in rows])
            together = [np.hstack(pair) for view in views.values() for pair in zip(states, standardised(view), strict=True)]
            views |= {"the frozen text states": states} | ({"text and features together": together} if together else {})
        return views

    def logits(self, batch: Batch) -> Tensor:
        """(B, outputs)."""
        return self.head(self.dropout(self.states([s.text for s in batch.samples], batch.inputs)))

    def own_loss(self, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) of the function ``config.loss``: of the head's outputs (B, …) and what they should be, likewise;
        ConfigError where it returns anything else."""
        name = self.config.loss
        given = user_code.called("task.loss", name, outputs, truth)
        total, count = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        fits = isinstance(total, Tensor) and total.ndim == 0 and total.requires_grad >= outputs.requires_grad
        if not fits or not is_count(count):
            raise ConfigError(
                f"task.loss={name} returned {str(given)[:60]!r}: let it return a sum over the batch, a tensor of shape ()"
                " made from the outputs, and the number that it is a mean over, above 0"
            )
        return total, torch.as_tensor(count, dtype=torch.float64)


def is_count(value: Any) -> bool:
    """Whether ``value`` is one finite number above 0; of a tensor without storage, as plans have, nothing is known."""
    if isinstance(value, Tensor):
        without = type(value) is not Tensor or value.is_meta
        return value.ndim == 0 and (without or is_count(value.item()))
    return isinstance(value, int | float) and 0 < value < math.inf
