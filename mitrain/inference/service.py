"""A run that any thread may ask: what waits is answered in batches, by one thread.

What is sent are bytes, which are written to a folder of their own and read as any file of a sample: no request can name a
file of this machine.
"""

import base64
import io
import logging
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mitrain.core.errors import ConfigError, UserError
from mitrain.core.version import __version__
from mitrain.data import figures
from mitrain.data.images import open_image
from mitrain.data.sources import limit
from mitrain.inference.export import SUFFIXES
from mitrain.inference.scoring import Asked, ask_all, masked_input
from mitrain.tasks.base import Answer
from mitrain.tasks.language import told_to_speak
from mitrain.training.build import resolve_data
from mitrain.training.runs import Run

log = logging.getLogger(__name__)

WAITING = 256  # requests in the queue; more are turned away
GALLERY = 200  # texts of the data that a retrieval run finds matches among
NEAREST = 10
Hear = Callable[[str], None]
How = tuple[bool, tuple[tuple[str, Any], ...], Hear | None]
"""Whether the inputs are infused, the settings by which the model speaks, and who hears what it says: alike for all samples
of a batch, so that what somebody hears is said alone."""


@dataclass(frozen=True)
class ServiceLimits:
    """``megabytes`` of a request; a batch has at most ``batch`` samples and waits ``milliseconds`` for more.
    ``generation``: settings of the task by which it speaks, in place of the run's."""

    megabytes: float = 64
    batch: int = 8
    milliseconds: float = 10
    generation: Mapping[str, Any] = field(default_factory=dict)


class Batcher:
    """One thread that answers what any thread asks, several samples together."""

    def __init__(self, run: Run, limits: ServiceLimits):
        self.run, self.limits = run, limits
        self.waiting: queue.Queue[tuple[Asked, How, Future[Answer]]] = queue.Queue(WAITING)
        self.counts: Counter[str] = Counter()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, asked: Asked, how: How) -> Answer:
        """The answer; raises what asking does, and `queue.Full` where too many wait."""
        future: Future[Answer] = Future()
        self.waiting.put_nowait((asked, how, future))
        return future.result()

    def _work(self) -> None:
        while True:
            batch, until = [self.waiting.get()], time.monotonic() + self.limits.milliseconds / 1000
            while len(batch) < self.limits.batch:
                try:
                    batch.append(self.waiting.get(timeout=max(until - time.monotonic(), 0)))
                except queue.Empty:
                    break
            for how in dict.fromkeys(how for _, how, _ in batch):
                self._answer([one for one in batch if one[1] == how], *how)

    def _answer(
        self,
        batch: Sequence[tuple[Asked, How, Future[Answer]]],
        infused: bool,
        generation: tuple[tuple[str, Any], ...],
        hear: Hear | None,
    ) -> None:
        begun = time.monotonic()
        try:
            found: list[Any] = ask_all(self.run, [asked for asked, _, _ in batch], infused, dict(generation), hear)
        except BaseException as error:  # the asking threads raise it again; this one goes on
            found = [error] * len(batch)
        self.counts.update(batches=1, samples=len(batch))
        self.counts["seconds"] += time.monotonic() - begun
        for (_, _, future), answer in zip(batch, found, strict=True):
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)


class Service:
    """What the routes do; they run in threads of the server's pool, but for the reading of requests."""

    def __init__(self, run: Run, limits: ServiceLimits):
        told_to_speak(run.model.task, limits.generation)  # or say what is wrong before anybody asks
        self.run, self.limits, self.batcher = run, limits, Batcher(run, limits)
        self.takes = {part.input: part.takes for part in reversed(run.config.model.encoders.values())}
        self.gallery = self._texts() if run.model.task.searches else []

    def _texts(self) -> list[str]:
        try:
            samples = self.run.config.data.read(resolve_data(self.run.config.data), "val")
        except UserError as error:
            log.warning("the data cannot be read, so that matches are found among a request's candidates alone: %s", error)
            return []
        return limit(list(dict.fromkeys(sample.text for sample in samples)), GALLERY)

    def about(self) -> dict[str, Any]:
        """What the page shows of the run."""
        data, task = self.run.config.data, self.run.model.task
        inputs = {name: {"takes": self.takes[name], "may_lack": name in data.may_lack} for name in data.inputs}
        return {
            "name": self.run.config.name,
            "task": self.run.config.task.section_name,
            "step": self.run.saved.step,
            "inputs": inputs,
            "asks": task.asks,
            "needs_text": not task.reads_no_text,
            "candidates": task.takes_candidates,
            "version": __version__,
        }

    def predict(
        self,
        contents: Mapping[str, bytes],
        text: str,
        candidates: Sequence[str],
        infused: bool,
        turns: tuple[str, ...] = (),
        generation: Mapping[str, Any] | None = None,
        hear: Hear | None = None,
    ) -> dict[str, Any]:
        """The JSON values of an answer. UserError for what cannot be asked."""
        how = infused, tuple(sorted({**self.limits.generation, **(generation or {})}.items())), hear
        candidates = candidates or self.gallery
        with tempfile.TemporaryDirectory() as folder:
            files = {name: self._written(Path(folder), name, content) for name, content in contents.items()}
            try:
                answer = self.batcher.ask(Asked(files, text, tuple(candidates) or None, turns), how)
            except UserError as error:  # the folder's name means nothing to those who ask
                raise type(error)(str(error).replace(f" in '{folder}'", "").replace(f"{folder}/", "")) from None
            values = {name: value for name, value in answer.values.items() if name not in files}
            if answer.mask is not None:
                picture = open_image(Path(folder), files[masked_input(self.run)].name, self.run.config.data.max_pixels)
                values["mask"] = as_uri(Image.fromarray(answer.mask.astype(np.uint8) * 255))
                values["overlay"] = as_uri(figures.overlay(picture, answer.mask))
        if "scores" in values:
            values["scores"] = dict(list(values["scores"].items())[:NEAREST])
        return values

    def _written(self, folder: Path, name: str, content: bytes) -> Path:
        if name not in self.takes:
            raise ConfigError(f"{name[:40]!r} is none of this run's inputs: it reads {', '.join(self.takes)}")
        path = folder / f"{name}{SUFFIXES[self.takes[name]]}"
        path.write_bytes(content)
        return path

    def metrics(self) -> str:
        """Counts in Prometheus' text format."""
        counts = self.batcher.counts
        values = {name: counts[name] for name in ("samples", "batches", "seconds")}
        lines = [f"# TYPE mitrain_{n}_total counter\nmitrain_{n}_total {v}" for n, v in values.items()]
        lines += ["# TYPE mitrain_waiting gauge", f"mitrain_waiting {self.batcher.waiting.qsize()}"]
        lines.append("# TYPE mitrain_requests_total counter")
        lines += [f"mitrain_requests_total{n} {c}" for n, c in sorted(counts.items()) if n.startswith("{")]
        return "\n".join(lines) + "\n"


def as_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
