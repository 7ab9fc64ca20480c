"""A process with a limit of time, and of which nothing is left behind."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mitrain.core.files import write_atomic

GRACE_S = 20.0
"""For which a process that is asked to stop may save where it is."""
BEAT_S = 5.0
LINE = 300
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def run(
    command: Sequence[str],
    said: Path,
    limit_s: float,
    grace_s: float = GRACE_S,
    beat: Callable[[], object] = lambda: None,
) -> int | None:
    """The exit code of ``command``, whose output goes to ``said``; None when it was stopped after ``limit_s`` seconds.

    On an interruption of this process it is asked to stop (SIGTERM), waited for, and killed if it does not. ``beat`` is
    called every few seconds meanwhile.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(said, "wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            return waited(process, time.monotonic() + limit_s, beat)
        finally:
            end(process, grace_s)


def waited(process: subprocess.Popen, until: float, beat: Callable[[], object]) -> int | None:
    """The exit code, or None where the process still runs at ``until`` on the monotonic clock."""
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, BEAT_S))
        beat()
    return process.poll()


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


def end_with(parent: int) -> bool:
    """Have this process asked to stop when ``parent`` ends, also where that is killed; False if it has ended already.

    On Linux; elsewhere a process whose parent is killed goes on to its end.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid() == parent


def last_line(path: Path) -> str:
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
        write_atomic(self.path, f"{self.seconds:.1f}\n")
