"""A training run under measurement: the trainer's own steps, without evaluation and without writing.

The text trunk is not cached, so every step runs all layers from the embeddings and ZeRO-3 gathers all of them; the image
features, which come from files, are.
"""

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.parity.cells import Cell, Plan
from benchmarks.parity.gathers import Gathered, counted_gathers
from mitrain.compare.resident import attached, frozen_parameters, frozen_tensors, optimizer_bytes, storages
from mitrain.core import dist
from mitrain.core.errors import UserError
from mitrain.data.loader import Draw
from mitrain.data.sources import limit
from mitrain.models import loading
from mitrain.training import schema
from mitrain.training.build import Model, build
from mitrain.training.engine.zero import sharding
from mitrain.training.schema import RunConfig
from mitrain.training.trainer import Trainer

Row = dict[str, Any]
Step = Callable[[], tuple[float, float]]
"""Trains one step: its loss before the update, and seconds."""


class Measured(Trainer):
    """The trainer on the first ``samples`` of its data, with every layer run in every step."""

    def __init__(self, config: RunConfig, samples: int, order: int = 0):
        self.samples, self.order = samples, order
        super().__init__(config, Path(), quiet=True)

    def _build(self) -> Model:
        """Without a cache of texts, in which the lower layers' outputs would be; the images' is the model's own."""
        model = self._load(self.config.model_copy(update={"cache": False}))
        model.config = self.config
        model.release = lambda: None  # what all frozen weights take is measured
        return model

    def _load(self, config: RunConfig) -> Model:
        return build(config, shard=sharding(config.zero, config.train.optimizer))

    def _encode(self) -> None:
        self.train = limit(self.train, self.samples)
        super()._encode()

    def _accumulate(self, draws: list[Draw[Any]], share: slice) -> None:
        super()._accumulate(permuted(draws, self.order), share)

    def step(self) -> tuple[float, float]:
        result, seconds = self._step()
        if not result.applied:
            raise UserError(f"a step was skipped ({result.reason}): its loss says nothing; lower train.lr")
        return result.loss, seconds


def permuted(draws: list[Draw[Any]], number: int) -> list[Draw[Any]]:
    """The same samples in the ``number``-th order, before the ranks share them: what is summed is the same, and in
    another order. 0: their own."""
    found = list(draws)
    if number:
        random.Random(number).shuffle(found)
    return found


@dataclass
class Subject:
    """What is measured: steps, the modules with frozen weights, what is trained, and torch's optimizer of it."""

    step: Step
    parts: Mapping[str, nn.Module]
    trained: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer


def ours(cell: Cell, plan: Plan, kind: type[Measured] = Measured) -> Subject:
    trainer = kind(schema.load(plan.config, plan.overrides(cell)), plan.samples, cell.order)
    return Subject(trainer.step, trainer.model.frozen, list(trainer.engine.params.values()), trainer.engine.optimizer)


def measure(subject: Subject, cell: Cell, plan: Plan) -> Row:
    """``plan.steps`` updates and one step more, of whose loss, after them, is reported; all ranks together.

    Bytes are the largest of any rank's.
    """
    losses, times = [], []
    with gathers(cell) as gathered:
        for _ in range(plan.steps + 1):
            before = gathered.bytes
            loss, seconds = subject.step()
            losses.append(loss)
            if not math.isfinite(loss):
                raise UserError(f"the loss of step {len(losses)} is {loss}: lower train.lr")
            times.append(seconds)
    own = {
        "resident_frozen_bytes_per_rank": resident_bytes(subject.parts),
        "resident_encoder_bytes_per_rank": resident_bytes({k: v for k, v in subject.parts.items() if k != "text"}),
        "gathered_bytes_per_step": gathered.bytes - before,
        "optimizer_bytes": optimizer_bytes(subject.optimizer, subject.trained),
        "step_ms": round(1e3 * statistics.median(times), 1),
    }
    ranks = dist.gather(own)
    return {
        **{key: max(rank[key] for rank in ranks) for key in own},
        "loss": losses[-1],
        "losses": losses,
        "whole_frozen_bytes": whole_bytes(subject.parts),
        "of_ranks": ranks,
    }


def gathers(cell: Cell) -> contextlib.AbstractContextManager[Gathered]:
    """Without ZeRO nothing is gathered, and DeepSpeed is not there to be counted."""
    return counted_gathers() if cell.zero else contextlib.nullcontext(Gathered())


def resident_bytes(parts: Mapping[str, nn.Module]) -> int:
    """Bytes that the frozen weights of ``parts`` take on this rank."""
    trained = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
    own = storages(t for p in trained for t in [p.data, *attached(p)])
    return sum(size for key, size in storages(frozen_tensors(parts)).items() if key not in own)


def whole_bytes(parts: Mapping[str, nn.Module]) -> int:
    """Payload, scales and buffers of ``parts``, each counted once and unsharded: arithmetic on shapes."""
    weights = sum(loading.elements(p) * p.element_size() for p in frozen_parameters(parts))
    buffers = {id(b): b.numel() * b.element_size() for part in parts.values() for b in part.buffers()}
    return weights + sum(buffers.values())
