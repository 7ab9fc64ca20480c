"""A process with a limit of time, and of which nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 20.0
"""For which a process that is asked to stop may save where it is."""
STOPPED = 75
"""Exit code of a process of ours that was asked to stop and has saved where it is."""
LINE = 300


def run(command: Sequence[str], said: Path, limit_s: float, grace_s: float = GRACE_S) -> int | None:
    """The exit code of ``command``, whose output goes to ``said``; None when it was stopped after ``limit_s`` seconds.

    On an interruption of this process it is asked to stop (SIGTERM), waited for, and killed if it does not.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(said, "wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process, grace_s)


def end(process: subprocess.Popen, grace_s: float) -> None:
    """Ask the process to stop, then kill it and those it has started."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(path: Path) -> str:
    """What a process said last."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.strip()[:LINE] for line in reversed(lines) if line.strip()), "it said nothing")


class Clock:
    """Seconds that a cell has taken over all its starts, kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.before = self._read()
        self._start = time.monotonic()

    def _read(self) -> float:
        try:
            return max(0.0, float(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return 0.0

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self._start

    def keep(self) -> None:
        self.path.write_text(f"{self.seconds:.1f}\n", encoding="utf-8")
