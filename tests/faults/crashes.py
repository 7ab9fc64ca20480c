"""The process of crash_worker.py, as tests speak with it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass
class Ending:
    """How a child ended: the last step it saved (or 0), its exit status, and the file operations it named."""

    step: int = 0
    status: int = 0
    names: set[str] = field(default_factory=set)

    @property
    def killed(self) -> bool:
        return self.status in (-signal.SIGKILL, -signal.SIGXFSZ)


class Worker:
    """One child at a time."""

    def __init__(self) -> None:
        command = [sys.executable, str(HERE / "crash_worker.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def start(self, what: str, folder: Path, at: int = 0) -> int:
        """The child's process id."""
        self.process.stdin.write(f"{what} {folder} {at}\n")
        self.process.stdin.flush()
        self.early: list[tuple[str, str]] = []
        word, value = self.line()
        while word != "pid":
            self.early.append((word, value))
            word, value = self.line()
        return int(value)

    def wait(self) -> Ending:
        ending = Ending()
        for word, value in self.lines():
            if word == "done":
                ending.step = int(value)
            if word == "names":
                ending.names = set(value.split(","))
            if word == "ended":
                ending.status = int(value)
                return ending
        raise AssertionError("the worker has died")

    def run(self, what: str, folder: Path, at: int = 0) -> Ending:
        self.start(what, folder, at)
        return self.wait()

    def lines(self) -> Iterator[tuple[str, str]]:
        yield from self.early
        while True:
            yield self.line()

    def line(self) -> tuple[str, str]:
        word, value = self.process.stdout.readline().split()
        return word, value

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
