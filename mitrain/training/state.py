"""RUN/state.json: whether a run is running, preempted, failed or done, and why; `mitrain runs` and job scripts read it.

{"state": "running" | "preempted" | "failed" | "done", "why": a line or null, "step": of "steps", "time": of the last word,
in seconds since 1970, "pid", "host", "exit_code": of `mitrain train`, null while it runs, 75 where it is to be run again}

A view like any other: that it cannot be written costs no run.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mitrain.core import dist, parsing
from mitrain.core.errors import UserError, exit_code
from mitrain.core.files import write_json

STATE = "state.json"
EVERY_S = 30.0  # between two words of a run that trains
SILENT_S = 1800.0  # without a word: `train.hang_minutes`, as it is left


@contextmanager
def recorded(folder: Path) -> Iterator["RunState"]:
    """Says of the block that it is running, and of an exception that ends it what it was; a block inside may do so, too.

    A mistake of the user's that ends it before the first step leaves what the file said before.
    """
    state, before = RunState(folder), read(folder)
    state.say("running")
    try:
        yield state
    except BaseException as error:
        if read(folder).get("state") == "running":
            stopped = isinstance(error, KeyboardInterrupt)
            why = signal.Signals(getattr(error, "number", signal.SIGINT)).name if stopped else line_of(error)
            if before and isinstance(error, UserError) and not state.begun:
                state.put(before)
            else:
                state.say("preempted" if stopped else "failed", why=why, exit_code=exit_code(error))
        raise


class RunState:
    """Rank 0 writes, the others do nothing."""

    def __init__(self, folder: Path):
        self.folder, self.said, self.begun = folder, 0.0, False
        self.known = {name: read(folder).get(name) for name in ("step", "steps")}

    def beat(self, step: int, steps: int) -> None:
        """Say now and then how far the run is."""
        self.known = {"step": step, "steps": steps}
        if time.monotonic() - self.said > EVERY_S:
            self.say("running")

    def say(self, state: str, why: str | None = None, exit_code: int | None = None) -> None:
        self.said = time.monotonic()
        own = {"time": round(time.time(), 3), "pid": os.getpid(), "host": socket.gethostname()}
        self.put({"state": state, "why": why, "exit_code": exit_code, **self.known, **own})

    def failed(self, why: str) -> None:
        """Of what ends the process at once."""
        self.say("failed", why, UserError.exit_code)

    def put(self, told: dict[str, Any]) -> None:
        if dist.is_main() and self.folder.exists():  # a folder that was moved away is not made anew
            with suppress(OSError):
                write_json(self.folder / STATE, told)


def read(folder: Path) -> dict[str, Any]:
    """What the file says; nothing where there is none, or it is torn."""
    return parsing.object_in(folder / STATE)


def line_of(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words if hasattr(error, "exit_code") else f"{type(error).__name__}: {words}".rstrip(": ")


def in_words(told: dict[str, Any]) -> str:
    """The state with its reason; a process that has ended without a word, or is silent for long, is no running one."""
    state, why = told.get("state"), told.get("why")
    if state != "running":
        return f"{state} ({why})" if why else str(state)
    who, silent = f"process {told.get('pid')} on {told.get('host')}", time.time() - float(told.get("time") or 0)
    if told.get("host") == socket.gethostname() and not alive(told.get("pid")):
        return f"died ({who} is gone)"
    return f"silent for {silent / 60:.0f} minutes ({who})" if silent > SILENT_S else f"running ({who})"


def alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
