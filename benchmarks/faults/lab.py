"""Starting commands as processes, and looking at what they leave.

A process is a fork of a server that has imported everything and done nothing else, in a session of its own: importing
takes a hundred times what the commands here take.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import inject as injections
from benchmarks.faults import world
from benchmarks.faults.inject import FIRED
from benchmarks.ranks import clean_environment, free_port
from mitrain.core.errors import PREEMPTED
from mitrain.training import checkpoint

MEMORY = 6 << 30
"""Bytes that a command may ask for, many times what any here needs: one that wants all there is ends by itself."""
LIMIT_S = 120.0
"""Longer than any command here takes on a busy machine: beyond it a command hangs."""
PRELOADED = ["benchmarks.faults.preload"]
Injection = tuple[Any, ...]


@dataclass(frozen=True)
class Ended:
    """How a process ended: minus the signal's number if by one, None if it had to be ended here after `LIMIT_S`."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What it complained of."""
        return [line for line in self.err.splitlines() if line.startswith("mitrain")]

    @property
    def state(self) -> str:
        """One word or two for the table."""
        if self.code is None:
            return "hung"
        if self.code < 0:
            return signal.Signals(-self.code).name
        if "Traceback" in self.err:
            return "traceback"
        return {0: "went on", 2: "refused" if len(self.lines) >= 1 else "silent 2", PREEMPTED: "went on"}.get(
            self.code, f"code {self.code}"
        )


@dataclass
class Process:
    """A running command."""

    process: Any
    folder: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        self.process.join(limit_s)
        hung = self.process.exitcode is None
        if hung:
            self.kill()
        seconds = time.monotonic() - self.started
        return Ended(None if hung else self.process.exitcode, self.said("out"), self.said("err"), seconds)

    def said(self, name: str) -> str:
        """What it has written so far, to ``out`` or ``err``."""
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()


class Lab:
    """A folder with a world in it, and a server that commands are forked from."""

    def __init__(self, folder: Path):
        self.folder, self.world = folder, folder / "world"
        self.started: list[Process] = []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        world.make(self.world)
        self._undisturbed: dict[int, dict[str, Any]] = {}

    def start(self, *arguments: Any, inject: Injection | None = None, fired: Path | None = None, **env: str) -> Process:
        """``mitrain ARGUMENTS`` in a process of its own. ``inject``: a function of `inject` and its arguments."""
        place = self.folder / "processes" / str(len(self.started))
        place.mkdir(parents=True)
        env = {"MITRAIN_CACHE": str(self.folder / "cache"), FIRED: str(fired or place / "fired"), **env}
        words = [str(a) for a in arguments]
        with clean_environment():
            process = self.context.Process(target=be_command, args=(place, words, inject, env))
            process.start()
        self.started.append(Process(process, place))
        return self.started[-1]

    def run(self, *arguments: Any, inject: Injection | None = None, **env: str) -> Ended:
        return self.start(*arguments, inject=inject, **env).wait()

    def start_ranks(
        self,
        argv: Sequence[Sequence[Any]],
        inject: dict[int, Injection] | None = None,
        fired: Path | None = None,
        **env: str,
    ) -> list[Process]:
        """A command on as many ranks as there are argument lists."""
        meet = {"WORLD_SIZE": str(len(argv)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            self.start(
                *words,
                inject=(inject or {}).get(rank),
                fired=fired,
                **meet,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "MITRAIN_TIMEOUT": "30", **env},
            )
            for rank, words in enumerate(argv)
        ]

    def scratch(self, name: str) -> Path:
        """A new folder for a case."""
        path = self.folder / "cases" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def other_world(self, case: Path) -> Path:
        """A copy of the world to damage, with its own configuration."""
        import yaml

        path = Path(shutil.copytree(self.world, case / "world"))
        (path / "config.yaml").write_text(yaml.safe_dump(world.configuration(path)), encoding="utf-8")
        return path

    def undisturbed(self, ranks: int = 1) -> "Left":
        """What a run leaves that nothing happened to."""
        run = self.folder / f"undisturbed-{ranks}"
        if not run.exists():
            argv = [["train", self.world / "config.yaml", "--run-dir", run]] * ranks
            started = self.start_ranks(argv) if ranks > 1 else [self.start(*argv[0])]
            ended = [process.wait() for process in started]
            if any(e.code for e in ended):
                raise RuntimeError("the undisturbed run failed: " + "".join(e.err for e in ended)[-2000:])
        return Left.of(run)

    def close(self) -> None:
        for process in self.started:
            process.kill()
        multiprocessing.forkserver._forkserver._stop()


def be_command(place: Path, words: list[str], injection: Injection | None, env: dict[str, str]) -> None:
    """A command's whole life."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    os.environ.update(env)
    if "PYTHONPATH" in env:  # which a fork has not read
        sys.path.insert(0, env["PYTHONPATH"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    if injection:
        getattr(injections, injection[0])(*injection[1:])
    sys.argv[1:] = words
    runpy.run_module("mitrain", run_name="__main__")  # as python -m mitrain does


@dataclass(frozen=True)
class Left:
    """What a run left: the loss of each step, the trained tensors, and the newest checkpoint's step."""

    losses: dict[int, float]
    tensors: dict[str, torch.Tensor]
    step: int

    @classmethod
    def of(cls, run: Path) -> "Left":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
        path = checkpoint.latest(run)
        if path is None:
            return cls(losses, {}, 0)
        saved = checkpoint.load(path)
        tensors = {f"{g}.{n}": t for g, named in saved.tensors.items() for n, t in named.items()}
        return cls(losses, tensors, saved.step)

    def equals(self, other: "Left") -> bool:
        """The same losses, step and trained tensors, bit for bit."""
        same = self.tensors.keys() == other.tensors.keys() and self.step == other.step
        return (
            same and self.losses == other.losses and all(torch.equal(t, other.tensors[n]) for n, t in self.tensors.items())
        )


def moment(path: Path) -> float | None:
    """When the fault took place, by its file."""
    try:
        return float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def opened() -> Iterator[Lab]:
    """A lab in a temporary folder; no command is left behind."""
    with tempfile.TemporaryDirectory(prefix="mitrain-faults-", ignore_cleanup_errors=True) as temporary:
        lab = Lab(Path(temporary))
        try:
            yield lab
        finally:
            lab.close()
