"""What a run has before its first step: models, samples, engine, and every file and text encoded once."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mitrain import methods
from mitrain.core import allocator, dist, user_code
from mitrain.core.errors import ConfigError, DataError
from mitrain.data.columns import bytes_of, take
from mitrain.data.features import Features
from mitrain.data.formats.manifest import Manifest
from mitrain.data.loader import Loader
from mitrain.data.samples import BadSamples
from mitrain.data.sources import limit, portion
from mitrain.data.streaming import StreamLoader
from mitrain.models.tokens import SPARE
from mitrain.tasks.base import Batch, cautions
from mitrain.tasks.readout import SEEN_SAMPLES, chunks, evenly
from mitrain.training import checkpoint, initial
from mitrain.training.best import Best
from mitrain.training.build import Model, build, resolve_data
from mitrain.training.engine import FP16_SCALE, Engine, Group, LocalEngine, cut_group
from mitrain.training.engine.zero import ZeroEngine, sharding
from mitrain.training.fingerprint import digest, fingerprint, require_same
from mitrain.training.guard import SkipBudget
from mitrain.training.prefetch import Batches, Draws
from mitrain.training.schedule import multiplier, span
from mitrain.training.schema import RunConfig
from mitrain.training.stragglers import Pace
from mitrain.training.telemetry import Stopwatch

log = logging.getLogger(__name__)
TOKENISED = 5000  # training samples whose texts are looked at before the first step, of more


class Setup:
    """Everything of a run that is there before its first step.

    ``allow_changes``: go on from a checkpoint of another configuration, other data or other frozen weights.
    """

    def __init__(self, config: RunConfig, folder: Path, *, quiet: bool = False, allow_changes: bool = False):
        self.config, self.folder, self.quiet = config, folder, quiet or not dist.is_main()
        self.allow_changes = allow_changes
        if config.train.permute and config.data.buffer:
            raise ConfigError("train.permute exchanges labels among all samples: leave data.stream out")
        self.own = user_code.sources(config.task)  # what cannot be imported is said before anything is loaded
        self.watch = Stopwatch()
        self.bad = BadSamples(config.data.bad_samples, config.data.bad_share)
        self.saved = 0  # the step of the newest checkpoint
        self.start = dist.from_main(self._start)
        with self.watch.phase("load models and data"):
            self.root = resolve_data(config.data)
            self.train = portion(config.data.read(self.root, "train"), config.train.fraction)
            self.val = limit(config.data.read(self.root, "val"), config.train.eval_samples)
            self.model: Model = self._build()
            if config.train.permute:
                self.train = self.model.task.permuted(self.train, config.seed)
            self.model.task.remember(self.train)
            self.best = Best(self.model.task.minimises, config.train.patience)
            self.engine = self._make_engine()
        self.drawn: Features | None = None  # of streamed samples, which nothing is kept of
        if config.data.buffer:
            self.drawn = self.model.features(config.data.file_root(self.root), self.bad, cached=False)
        self._encode()
        train = config.train
        self.span = span(train.steps, train.epochs, len(self.train), train.batch * train.accumulate)
        # Until here all ranks drew the same start values; from here each draws its own dropout and noise.
        if dist.world() > 1:
            checkpoint.seed_rank(config.seed, 0, dist.rank())
        # What frozen models must run for, or all ranks together, cannot be made beside a step.
        ahead = config.cache and self.drawn is None and not self.engine.lockstep
        self.batches = Batches(self._loader(), self._batch, ahead)
        self.waited = 0.0  # seconds of the last step that its input took
        self.skips = SkipBudget(total=config.train.max_skipped)
        self.pace = Pace(config.train.log_every, self.engine.lockstep)

    def _build(self) -> Model:
        shard = sharding(self.config.zero, self.config.train.optimizer)
        return build(self.config, shard=shard, lean=not self.config.data.buffer)

    def _batch(self, draws: Draws) -> Batch | None:
        """This rank's share of drawn samples; one that does not count where it has none and the ranks run in step."""
        share = dist.shard_of(len(draws))
        idle = not draws[share]
        if idle and not self.engine.lockstep:
            return None
        return self.model.training_batch(draws, self.drawn or self.features, slice(0, 1) if idle else share)

    def _loader(self) -> Loader[Any] | StreamLoader:
        batch, seed = self.config.train.batch, self.config.seed
        if self.drawn is None:
            tokens = lambda sample: self.model.task.tokens([sample])  # noqa: E731
            lengths = list(map(tokens, self.train)) if self.config.train.group_by_length else None
            return Loader(self.train, batch, seed, lengths)
        return self.config.data.stream_of(self.root, self.drawn.readable_in_block, batch, seed)

    def _make_engine(self) -> Engine:
        train, zero = self.config.train, self.config.zero
        # How many steps there are is known when the samples have been read; the first step asks for its rate.
        schedule = lambda step: multiplier(train.schedule, step, self.span.steps)  # noqa: E731
        common = (self._groups(), schedule, train.optimizer)
        scale = FP16_SCALE if self.config.model.dtype == "fp16" else 1.0
        if not zero.stage:
            return LocalEngine(*common, scale)
        # Only stage 3 shards frozen weights; below it DeepSpeed need not know of them.
        parts = {**self.model.trainable, **(self.model.frozen if zero.stage == 3 else {})}
        return ZeroEngine(parts, *common, zero, scale)

    def _encode(self) -> None:
        """Run everything frozen once, and take the statistics that follow from it."""
        config = self.config
        self.features: Features = self.model.features(config.data.file_root(self.root), self.bad)
        splits = {"train": self.train, "val": self.val}
        if dist.world() > 1:  # what differs besides the files' contents is said before the encoders run
            require_same(fingerprint(config.to_dict(), splits, lambda _: {}, self.model.base))
        with self.watch.phase("encode inputs"):
            views = {"train": config.features.views, "val": config.features.eval_views}
            total = sum(self.features.work(part, views[name]) for name, part in splits.items())
            with self._bar(total, "encode inputs") as bar:
                for name, part in splits.items():
                    splits[name] = self.features.readable(part, views[name], bar.update)
                    if not splits[name]:
                        raise DataError(f"no sample of the split {name!r} can be read: check data.root")
        allocator.give_back()  # of pictures and encoders, before the language model's layers come
        self.train, self.val = splits.values()
        self.fingerprint = fingerprint(config.to_dict(), splits, self.features.contents, self.model.base) | self.own
        if self.drawn is not None:
            source = Manifest(self.root, config.data.splits["train"])
            self.fingerprint["data.train.files"] = digest(source.sizes())
        require_same(self.fingerprint)
        for line in cautions(self.model.task, self.val, "the split 'val'", getattr(self.model.task, "known", None)):
            log.warning(line)
        with self.watch.phase("encode texts"):
            rows = self.model.texts(self._looked_at(), False) + self.model.texts(self.val, True)
            with self._bar(len(rows), "encode texts") as bar:
                self.model.states.prepare(rows, bar.update)
            self.model.task.rehearse(self.val)
            with self.engine.gathered(write=True):
                self.model.train(False)
                # An adapter goes on with the statistics of the features that it was trained on.
                if not (self.start and initial.load_adapter(self.start, self.model, self.allow_changes)):
                    self.model.norm.fit(self.features.moments(self.train) if self.model.norm.standardizes else {})
                if not self.start:
                    methods.calibrate(self.model.adapter, self._passes)
                self.model.task.fit(self.train, self._see)
                if self.start:
                    initial.load_head(self.start, self.model)
        with self.engine.gathered(write=True):
            # Each rank computed these itself, machines may differ in the last bits, and unequal weights stay unequal.
            for module in self.model.trainable.values():
                dist.copy_from_main(module.state_dict().values())
        allocator.give_back()  # of what the statistics were made from
        if config.cache and self.drawn is None:  # what is streamed is encoded as it comes
            self.model.release()

    def _looked_at(self) -> Sequence[Any]:
        """The training samples whose texts are tokenised before the first step: all where states of them are kept.

        Of many others some, evenly spread, and all that may be longer than the model reads; the steps tokenise the rest.
        """
        task, positions = self.config.task, self.model.text.positions
        if self.model.states.cached or len(self.train) <= TOKENISED:
            return self.train
        numbers = {i * len(self.train) // TOKENISED for i in range(TOKENISED)}
        if positions and getattr(task, "max_tokens", positions + 1) > positions:
            turns = getattr(task, "chat", False) or getattr(task, "turn", "")  # each has words around it
            spare = len(getattr(task, "template", "").encode()) + getattr(task, "max_new_tokens", 0) + SPARE
            numbers |= {i for i, size in enumerate(bytes_of(self.train)) if turns or size + spare > positions}
        return take(self.train, sorted(numbers))

    @torch.no_grad()
    def _passes(self) -> None:
        for samples in chunks(evenly(self.train, SEEN_SAMPLES)):
            self.model.task.loss(self._see(samples))

    def _start(self) -> initial.Start | None:
        """What ``train.init_from`` names; a run that has a checkpoint of its own goes on from that."""
        place = self.config.train.init_from
        return initial.read(place) if place and not checkpoint.any_published(self.folder) else None

    def _see(self, samples: Sequence[Any]) -> Batch:
        return self.model.evaluation_batch(samples, [s.inputs for s in samples], self.features)

    def _bar(self, total: int, text: str) -> tqdm:
        return tqdm(total=total, desc=text, disable=self.quiet or None, file=sys.stderr, leave=False)

    def _groups(self) -> list[Group]:
        train = self.config.train
        rates = {"adapter": train.lr, "head": train.head_lr or train.lr}
        named = {name: {f"{name}.{n}": p for n, p in self.model.trainable[name].named_parameters()} for name in rates}
        for start in train.rates:
            if not any(n.startswith(start) for part in named.values() for n in part):
                raise ConfigError(f"train.rates names {start!r}, and no trained parameter's name begins so")
        groups = [Group(name, named[name], rates[name], train.weight_decay) for name in rates]
        return [part for group in groups for part in cut_group(group, train.rates)]
