"""wandb, TensorBoard, MLflow and trackio, each in a process of its own, `tracker_process`: none stops or holds up a run."""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mitrain.core.config import Section
from mitrain.core.errors import MissingExtraError, need_extra
from mitrain.training.telemetry import plain
from mitrain.training.tracker_process import FAILED

log = logging.getLogger(__name__)

MOST_KEPT = 16 << 20  # bytes of numbers that a tracker may lag behind
FINISH_S, HURRY_S = 60.0, 5.0  # for which trackers may finish; where the run was asked to end, or was killed
LOOK_S = 0.02


class TelemetryConfig(Section):
    """``trackers``: where numbers go beside metrics.jsonl; ``project``: where MLflow and trackio list the run."""

    trackers: tuple[Literal["wandb", "tensorboard", "mlflow", "trackio"], ...] = ()
    project: str = "mitrain"


class WandbConfig(Section):
    """Of the tracker wandb. ``mode: auto`` is online when a key is found and the server answers within three seconds, else
    offline."""

    project: str = "mitrain"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"


class Trackers:
    """The trackers of a run, for `telemetry.Metrics`; without any it does nothing.

    ``step``: the run goes on behind it. ``asked()`` is true once a signal wants the run to end: at the end trackers then
    have `HURRY_S` seconds and no longer `FINISH_S`. Only a missing package is an error (MissingExtraError).
    """

    def __init__(
        self,
        config: TelemetryConfig,
        wandb: WandbConfig,
        run_dir: str | Path,
        settings: Mapping[str, Any],
        step: int = 0,
        asked: Callable[[], object] = lambda: None,
    ):
        self.asked, names = asked, dict.fromkeys(config.trackers)
        for name in names:
            require(name)
        folder = Path(run_dir).absolute()
        options = {"name": folder.name, "folder": str(folder), "config": plain(settings), "step": step}
        own = {name: wandb.to_dict() if name == "wandb" else {"project": config.project} for name in names}
        self.each = [Tracker(name, options | own[name]) for name in names]

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for tracker in self.each:
            tracker.log(values, step)

    def finish(self) -> None:
        """Wait for them to finish, for a while."""
        start = time.monotonic()
        try:
            while waiting := [tracker for tracker in self.each if not tracker.finished()]:
                patience = min(FINISH_S, HURRY_S) if self.asked() else FINISH_S
                if time.monotonic() - start > patience:
                    for tracker in waiting:
                        tracker.lost(f"it has not finished in {patience:g} s")
        finally:
            for tracker in self.each:
                tracker.end()


class Tracker:
    """One of them, in a process of its own.

    ``log`` never waits: what the tracker has not taken yet is kept, up to `MOST_KEPT` bytes. Where it fails, hangs or ends,
    the run says so once and goes on without it.
    """

    def __init__(self, name: str, options: Mapping[str, Any]):
        self.name, self.kept = name, bytearray()
        self.process: subprocess.Popen | None = None
        try:
            self._start(options)
        except OSError as error:  # its pipe is full, or its process is gone
            self.lost(str(error))

    def _start(self, options: Mapping[str, Any]) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - its life is the process's
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mitrain.training.tracker_process", str(os.getpid()), str(HURRY_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        self._send({"tracker": self.name, "init": options})

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if self.process:
            self._send({"log": dict(values), "step": step})

    def _send(self, message: Mapping[str, Any]) -> None:
        self.kept += json.dumps(message).encode() + b"\n"
        self._hand_over()

    def _hand_over(self) -> None:
        try:
            while self.kept:
                del self.kept[: os.write(self.process.stdin.fileno(), self.kept[:65536])]
        except BlockingIOError:
            if len(self.kept) > MOST_KEPT:
                self.lost(f"it does not take its numbers, {len(self.kept)} bytes of them")
        except OSError:  # the pipe has no reader
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # for its exit code
            self.lost(self._ending())

    def finished(self) -> bool:
        """Whether its process has ended; hands over what it has not taken yet, and waits a moment."""
        if not self.process:
            return True
        if self.kept:
            self._hand_over()
        elif not self.process.stdin.closed:
            self.process.stdin.close()
        if self.process:
            with suppress(subprocess.TimeoutExpired):
                if self.process.wait(LOOK_S):
                    self.lost(self._ending())
        return self.process is None or self.process.returncode == 0

    def _ending(self) -> str:
        """How the process ended: what the tracker raised, or the exit code."""
        self.said.seek(0)
        lines = self.said.read().decode("utf-8", "replace").splitlines()
        raised = [line.removeprefix(FAILED) for line in lines if line.startswith(FAILED)]
        return raised[-1] if raised else f"its process ended with {self.process.poll()}"

    def lost(self, why: str) -> None:
        log.warning("%s failed (%s): going on without it", self.name, why)
        self.end()

    def end(self) -> None:
        """Leave nothing behind: neither the process nor those it has started."""
        process, self.process = self.process, None
        if process:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdin.close()
            self.said.close()


def require(name: str) -> None:
    """MissingExtraError where the package of a tracker is not installed; it is not imported."""
    with suppress(ValueError):  # sys.modules holds something else in its place
        if importlib.util.find_spec(name) is not None:
            return
    if name in ("mlflow", "trackio"):  # no extras: these hold pyarrow below 26, and Pillow, which resizes pictures, below 13
        raise MissingExtraError(f"telemetry.trackers={name} needs the package {name!r}: install it with pip install {name}")
    need_extra(name, name, f"telemetry.trackers={name}")
