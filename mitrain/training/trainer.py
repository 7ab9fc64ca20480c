"""Training, as the algorithm box of a paper:

encode every file and every text once with what is frozen
for step = 1 … steps:
    for each micro-batch:  (sum, count) ← task.loss(batch) + adapter.extra_loss();  accumulate the gradient of the sum
    divide by the total count, clip, update the adapter and the head — or say why not
    now and then: score val, keep the best; save

On several ranks each computes its share of every micro-batch and of every evaluation; sums and counts are added up over
the ranks, so the run is the same as that of one process. Rank 0 alone reads and writes the run folder.
"""

import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mitrain.core import allocator, dist
from mitrain.core.errors import PREEMPTED, CheckpointError, ConfigError
from mitrain.core.files import write_json
from mitrain.core.ownership import Standing, owned
from mitrain.models import release
from mitrain.tasks.base import Batch
from mitrain.training import checkpoint, preflight, resume, runs
from mitrain.training.checkpoint import Checkpoint
from mitrain.training.engine import StepResult, Sums, regularised
from mitrain.training.evaluate import evaluate
from mitrain.training.guard import Heartbeat, StopRequest, diverged
from mitrain.training.prefetch import Draws
from mitrain.training.setup import Setup
from mitrain.training.state import RunState, recorded
from mitrain.training.telemetry import Metrics, NoMetrics
from mitrain.training.trackers import Trackers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``stopped`` is the signal's name if it was asked to stop before its last step, ``ended`` what else
    ended it there."""

    folder: Path
    step: int
    best: float
    best_step: int
    stopped: str | None
    ended: str | None
    phases: dict[str, float]

    @property
    def exit_code(self) -> int:
        """Of the command: 0 when it is done, 130 after Ctrl-C, PREEMPTED after a scheduler's signal."""
        if self.stopped is None:
            return 0
        return 128 + signal.SIGINT if self.stopped == "SIGINT" else PREEMPTED


class Trainer(Setup):
    """One run, from its configuration to its best checkpoint; takes what `Setup` takes."""

    def resume(self) -> int:
        """Continue from the newest usable checkpoint; returns its step (0: from the start)."""
        saved = dist.from_main(self._newest)
        if saved is not None:
            resume.compare(saved, self.fingerprint, self.allow_changes)
            self._take(saved)
        if self.allow_changes:
            dist.from_main(lambda: runs.write_config(self.config, self.folder))
        if self.config.train.epochs:
            note = f"; {self.config.train.epochs:g} epochs of {len(self.train)} samples: {self.span.steps} steps"
            dist.from_main(lambda: runs.write_config(self.config, self.folder, note))
        return saved.step if saved else 0

    def _take(self, saved: Checkpoint) -> None:
        with self.engine.gathered(write=True):
            runs.restore(self.model, saved)
        try:
            self.engine.load_state_dict(saved.tensors["optimizer"], saved.state["engine"])
            self.batches.load_state(saved.state["loader"], self.allow_changes)
            self.skips.load_state_dict(saved.state["skips"])
            self.best.load_state(saved.state)
            self.saved = saved.step
            checkpoint.resume_rng(saved.state["rng"], self.config.seed, saved.step)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{saved.path} does not fit this run ({error}): its data or configuration changed; start a new run"
            ) from None

    def _newest(self) -> Checkpoint | None:
        saved = next(checkpoint.usable(self.folder), None)
        if saved is None and checkpoint.any_published(self.folder):
            runs.without_checkpoint(self.folder)
        return saved

    def fit(self) -> Outcome:
        """Train to the last step, or until asked to stop; CheckpointError where another process trains in the folder."""
        with owned(self.folder), recorded(self.folder) as state, closing(self.batches):
            return self._fit(state)

    def _fit(self, state: RunState) -> Outcome:
        train, span = self.config.train, self.span
        first = step = self.resume()
        heart = Heartbeat(train.hang_minutes)
        self.standing = Standing(self.folder)
        # The result is written before the metrics are closed, which may wait for wandb.
        with StopRequest() as stop, closing(self._metrics(step, stop)) as metrics, closing(self.standing), heart:
            # A signal may reach one rank alone: all must leave the loop at the same step, or the others wait forever.
            preflight.check(self, step)
            state.begun = True
            self.pace.clear()
            stopped = dist.first_not_none(stop.requested)
            while step < span.steps and not stopped and not self.best.ended:
                result, seconds = self._step()
                # What a gradient reaches follows from the configuration: the first step shows it.
                if step == first and result.applied:
                    self._check_reached(result.unreached)
                if step == first:
                    dist.shorten_timeout()  # what differs between ranks before it, as encoding and compiling, is over
                step += 1
                heart.beat()
                state.beat(step, span.steps)
                self.skips.record(step, result.reason, self.saved)
                metrics.step(
                    step,
                    loss=result.loss,
                    lr=result.lr,
                    grad_norm=result.grad_norm,
                    samples=self.config.train.batch * self.config.train.accumulate,
                    tokens=self.tokens,
                    seconds=seconds,
                    waited=self.waited,
                    skipped=result.reason,
                )
                self.pace.report(step)
                last = step == span.steps
                if last and not self.engine.applied:
                    raise self.skips.failed(step)
                improved = self._evaluate(step, metrics) if last or span.due(train.eval_every, step) else False
                last = last or self.best.ended is not None
                stopped = dist.first_not_none(stop.requested or self.standing.fault())
                if improved or last or span.due(train.save_every, step) or stopped:
                    # A second signal would end the process in the middle of a checkpoint.
                    with stop.shield(), self.watch.phase("save"):
                        self._save(step, improved)
            ended = self.best.ended if step < span.steps else None
            stopped = stopped if step < span.steps and not ended else None
            outcome = Outcome(self.folder, step, self.best.value, self.best.step, stopped, ended, self.watch.report())
            state.known = {"step": step, "steps": span.steps}
            if outcome.stopped is None:
                dist.from_main(lambda: self._finish(outcome))
                state.say("done", outcome.ended or "last step", outcome.exit_code)
            else:
                state.say("preempted", outcome.stopped, outcome.exit_code)
        return outcome

    def _metrics(self, step: int, stop: StopRequest) -> Metrics | NoMetrics:
        if not dist.is_main():
            return NoMetrics()
        train = self.config.train
        console = None if self.quiet else sys.stderr
        given = (self.config.telemetry, self.config.wandb, self.folder, self.config.to_dict())
        board = Trackers(*given, step, lambda: stop.requested)
        return Metrics(self.folder / "metrics.jsonl", self.span.steps, console, train.log_every, step, board)

    def _step(self) -> tuple[StepResult, float]:
        start = time.perf_counter()
        with self.watch.phase("train"):
            self.model.train()
            self.tokens, self.waited = 0, 0.0
            for _ in range(self.config.train.accumulate):
                with self._waiting():
                    draws = self.batches.next()
                self._accumulate(draws, dist.shard_of(len(draws)))
                self.tokens += self.model.task.tokens([draw.sample for draw in draws])
            self.pace.arrive()
            dist.mark(self.engine.steps + 1)
            result = self.engine.step()
        return result, time.perf_counter() - start

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        with self.pace.part("input"), self.watch.phase("wait for input"):
            yield
        self.waited += time.perf_counter() - start

    def _accumulate(self, draws: Draws, share: slice) -> None:
        """The gradients of this rank's share of a micro-batch; of fewer samples than ranks some get none.

        Where the weights lie on all ranks, such a rank runs a sample that does not count.
        """
        idle = not draws[share]
        if idle and not self.engine.lockstep:
            return
        with self._waiting():
            batch = self.batches.of(draws)
        with self.pace.part("compute"):
            # Through the engine: at stage 3 the modules gather their weights only within its forward pass.
            total, count = self.engine.forward(lambda: self.loss(batch))
            self.engine.backward(total, 0 if idle else count)

    def loss(self, batch: Batch) -> Sums:
        """(sum, count) of a batch, the adapter's regulariser included."""
        return regularised(self.model.task.loss(batch), self.model.adapter.extra_loss())

    def _check_reached(self, unreached: Sequence[str]) -> None:
        """Name what of the adapter gets no gradient; ConfigError where nothing does, which would train the head alone."""
        own = [f"adapter.{name}" for name, _ in self.model.trainable["adapter"].named_parameters()]
        without = set(unreached)
        missed = [name for name in own if name in without]
        if own and len(missed) == len(own):
            raise ConfigError(
                f"the task reads nothing that the method {self.model.adapter.traits.name!r} changes: no gradient reached it"
                " in the first step. Change task.readout or task.matching, or take adapter.name=none"
            )
        if missed:
            shown = ", ".join(missed[:3]) + (", …" if len(missed) > 3 else "")
            log.warning("%d of the adapter's %d tensors get no gradient: %s", len(missed), len(own), shown)

    def _evaluate(self, step: int, metrics: Metrics | NoMetrics) -> bool:
        """Score val; whether this is the best so far."""
        self.model.train(False)
        allocator.give_back()  # of activations: what scoring holds has other sizes
        with self.engine.gathered():
            self._require_finite(step, self._trained())
        with self.watch.phase("evaluate"):
            options = {"batch": self.config.train.eval_batch, "what": f"val at step {step}"}
            with self.engine.apart(), release.borrowed(self.model.text.model):
                scores = evaluate(self.model, self.features, self.val, **options).metrics
        metrics.event("val", step, scores)
        value = float(scores[self.model.task.metric])
        if not math.isfinite(value):
            raise diverged(f"val {self.model.task.metric} is {value}", step, self.saved)
        return self.best.take(value, step)

    def _save(self, step: int, improved: bool) -> None:
        """All ranks together: each may hold a part of the optimizer's state."""
        # Both are collectives, so every rank calls them, though rank 0 alone writes.
        optimizer, engine = self.engine.state_dict()
        random = checkpoint.rng_of_ranks()
        with self.engine.gathered():
            tensors = {**self._trained(), "optimizer": optimizer}
            self._require_finite(step, tensors)
            dist.from_main(lambda: self._write(step, improved, tensors, {"engine": engine, "rng": random}))
        self.saved = step

    def _trained(self) -> dict[str, dict[str, Tensor]]:
        return {name: checkpoint.only_trainable(module) for name, module in self.model.trainable.items()}

    def _require_finite(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """UserError on all ranks where ``tensors`` are not finite on any: such a model is neither scored nor saved."""
        where = dist.first_not_none(checkpoint.not_finite(tensors))
        if where is not None:
            raise diverged(f"{where} is not finite", step, self.saved)

    def _write(self, step: int, improved: bool, tensors: dict[str, dict[str, Tensor]], more: dict[str, Any]) -> None:
        self.standing.check(step)
        state = {
            **more,
            "loader": self.batches.state(),
            "skips": self.skips.state_dict(),
            **self.best.state_dict(),
            "steps": self.span.steps,
            "folder": str(self.folder.absolute()),
            "config": self.config.to_dict(),
            "config_hash": self.config.hash,
            "fingerprint": resume.recorded(self.fingerprint),
        }
        checkpoint.save(self.folder, step, tensors, state, keep=self.config.train.keep, best=improved)

    def _finish(self, outcome: Outcome) -> None:
        summary = {
            "metric": self.model.task.metric,
            "best": outcome.best,
            "best_step": outcome.best_step,
            "steps": outcome.step,
            "ended": outcome.ended or "last step",
            "seconds": {name: round(value, 2) for name, value in outcome.phases.items()},
            "config_hash": self.config.hash,
        }
        write_json(self.folder / "summary.json", summary)
