"""What a run reports: a JSONL file always, one readable console line, trackers if asked for, and where the time went.

``metrics.jsonl`` is the record: one JSON object a line, appended by single writes, strictly valid (a value that is
not finite is null). Everything else is a view of it.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from mitrain.core.errors import UserError
from mitrain.core.files import remedy, write_atomic


class Metrics:
    """Takes the numbers of every step and evaluation.

    ``path``: the JSONL file; lines beyond ``resumed_step`` (0 for a new run) belong to a future that an interruption
    took back and are removed. ``console``: where a line goes every ``every`` steps (a terminal also shows
    a progress bar), or None for silence. ``board``: `Trackers`, or whatever else has their ``log`` and ``finish``.
    """

    def __init__(
        self,
        path: str | Path,
        total_steps: int,
        console: TextIO | None = None,
        every: int = 10,
        resumed_step: int = 0,
        board: Any = None,
    ):
        self.total_steps = total_steps
        self.console = console
        self.every = every
        self.board = board
        self._window = dict.fromkeys(("samples", "tokens", "seconds"), 0.0)
        self._steps, self._seconds = 0, 0.0
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        truncate_after(self.path, resumed_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        shown = console is not None and console.isatty()  # in a log lines are enough
        self._bar = tqdm(
            total=total_steps, initial=resumed_step, desc="train", unit="step", file=console, disable=not shown, leave=False
        )

    def step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        samples: float,
        tokens: float,
        seconds: float,
        waited: float = 0.0,
        skipped: str | None = None,
    ) -> None:
        """One training step: its number (from 1), mean loss, what it saw, and how many seconds it took, of which its input
        ``waited``."""
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "samples": samples, "tokens": tokens}
        values |= {"seconds": seconds, "waited": waited, "memory": memory_bytes()}
        values |= {"skipped": skipped} if skipped else {}
        self._record("train", step, values)
        for key in self._window:
            self._window[key] += values[key]
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        with suppress(OSError):  # a terminal that was closed must not end the run
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update()
        if skipped:
            self._print(step, f"skipped: {skipped}")
        if step % self.every == 0 or step == self.total_steps:
            self._print(step, self._line(step, values))
            self._window = dict.fromkeys(self._window, 0.0)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Anything else that is measured at a step, such as an evaluation; ``kind`` names it ("val", "test")."""
        self._record(kind, step, values)
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
        self._print(step, "  ".join([kind, *shown]))

    def close(self) -> None:
        self._file.close()
        with suppress(OSError):
            self._bar.close()
        if self.board:
            self.board.finish()

    def _record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        values = plain(values)
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): {remedy(error)} and resume") from None
        if self.board:
            self.board.log({f"{kind}/{key}": value for key, value in values.items()}, step)

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        seconds = max(self._window["seconds"], 1e-9)
        remaining = (self.total_steps - step) * self._seconds / self._steps
        parts = [
            f"loss {values['loss']:.4f}",
            f"lr {values['lr']:.2e}",
            f"{amount(self._window['samples'] / seconds)} samples/s",
            f"{amount(self._window['tokens'] / seconds)} tokens/s",
            f"memory {values['memory'] / 2**30:.1f} GiB",
            f"eta {duration(remaining)}",
        ]
        return "  ".join(parts)

    def _print(self, step: int, text: str) -> None:
        if self.console:
            width = len(str(self.total_steps))
            with suppress(OSError), tqdm.external_write_mode(self.console):
                print(f"step {step:>{width}}/{self.total_steps}  {text}", file=self.console, flush=True)


class NoMetrics:
    """Takes what ``Metrics`` takes and keeps nothing: what every rank but the first reports to."""

    def step(self, step: int, **values: Any) -> None: ...

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file that are torn or belong to a later step than ``step``."""
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{str(path)!r} is not a plain file: remove it or give another run folder")
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if is_up_to(line, step)]
    if kept != lines:
        write_atomic(path, b"".join(kept))


def is_up_to(line: bytes, step: int) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return line.endswith(b"\n") and isinstance(value, dict) and type(value.get("step")) is int and value["step"] <= step


def plain(value: Any) -> Any:
    """The JSON form: tensors and NumPy scalars as numbers, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_bytes() -> int:
    """The peak so far: allocated on the GPU if there is one, else the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def amount(value: float) -> str:
    """Three digits: 0.42, 41.2, 1.24k, 3.1M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """45 s, 2:13 or 1:02:03."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


class Stopwatch:
    """Adds up the time of named phases; the time of an inner phase does not count for the outer one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._names: list[str] = []
        self._start = self._mark = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._names.append(name)
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def _charge(self) -> None:
        now = self._clock()
        if self._names:
            self.seconds[self._names[-1]] = self.seconds.get(self._names[-1], 0.0) + now - self._mark
        self._mark = now

    def report(self) -> dict[str, float]:
        """Seconds by phase, the rest as "other"; they add up to the time since the start."""
        self._charge()
        return {**self.seconds, "other": self._mark - self._start - sum(self.seconds.values())}

    def table(self) -> str:
        report = self.report()
        total = sum(report.values())
        width = max(map(len, report))
        lines = [
            f"  {name:<{width}}  {seconds:8.1f} s  {100 * seconds / max(total, 1e-9):3.0f} %"
            for name, seconds in report.items()
        ]
        return "\n".join([f"where the time went ({duration(total)} in all)", *lines])
