"""Ranks for tests: a small world to train in, and groups of processes forked from one that has imported everything.

Importing costs a rank many times what its training here takes. ``Forge`` imports once; every rank that it starts is a
fork with a place, an environment and output files of its own, and ends like any process, interpreter and all.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".", "kernels", "examples/demo", "tests", "tests/support", "tests/dist", "tests/faults")
PATH = os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
IMPORTED = (
    "mitrain.cli mitrain.training.trainer mitrain.inference.scoring PIL.Image transformers.models.llama.modeling_llama"
    " transformers.models.dinov2.modeling_dinov2 transformers.conversion_mapping"
).split()
DEEPSPEED = ("deepspeed", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer")
STEPS = 6
TRAIN = {"steps": STEPS, "batch": 7, "accumulate": 2, "lr": 1e-2, "eval_every": 3, "save_every": 3, "keep": 9,
         "eval_batch": 5, "schedule": {"name": "constant"}}  # fmt: skip
SAMPLES = 24


def make_world(path: Path) -> Path:
    """Models, data and ``config.yaml`` under ``path``: 6 steps of 14 samples, in micro-batches of 7."""
    from folders import colour_folder, run_settings

    config = run_settings(
        colour_folder(path, SAMPLES, 13, width=48),
        vision={"layer": 2},
        adapter={"name": "mit", "layers": [1, 2]},
        features={"views": 2, "noise": 0.05, "dropout": 0.1},
        train=TRAIN,
    )
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def run_folder(parent: Path, name: str) -> Path:
    (folder,) = parent.glob(f"{name}-2*")
    return folder


def losses(folder: Path) -> list[float]:
    """The loss of every step of a finished run of `STEPS` steps."""
    found = losses_of(folder)
    assert len(found) == STEPS
    return found


def losses_of(folder: Path) -> list[float]:
    """The loss of every step of a finished run, each step recorded once and none skipped."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert not any("skipped" in line for line in steps)
    return [line["loss"] for line in steps]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def need(*programs: str, root: bool = True) -> None:
    """Skip where a program is not installed, or where nobody is root."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    absent = [program for program in programs if shutil.which(program, path=path) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    if root and os.geteuid() != 0:
        pytest.skip("needs root")


@dataclass(frozen=True)
class Ended:
    """How a process ended (minus the signal's number if by one) and what it said."""

    code: int
    out: str
    err: str


class Group:
    """The ranks of one start; ``pids`` in their order."""

    def __init__(self, forge: "Forge", pids: list[int], folder: Path):
        self.forge, self.pids, self.folder = forge, pids, folder

    def wait(self, *ranks: int, timeout: float = 900) -> list[Ended]:
        """How ``ranks`` ended, all if none is named; the whole group is killed after ``timeout`` seconds."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        try:
            return [self._ended(rank) for rank in ranks or range(len(self.pids))]
        finally:
            timer.cancel()

    def _ended(self, rank: int) -> Ended:
        code = self.forge.order(wait=self.pids[rank])
        return Ended(code, *((self.folder / f"{rank}.{name}").read_text() for name in ("out", "err")))

    def kill(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)


class Forge:
    """The process that imports once and forks ranks."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.groups = 0
        env = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line sets it before torch is imported
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-W", "error", __file__], env=env, **pipes)

    def order(self, **order: Any) -> Any:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, world: int, call: str, *arguments: Any, **env: str) -> Group:
        """``world`` ranks that each call ``call`` ("module:function") and exit with the number that it returns."""
        self.groups += 1
        folder = self.folder / str(self.groups)
        folder.mkdir()
        meet = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        order = {"call": call, "arguments": [str(a) for a in arguments], "env": {**meet, **env}}
        return Group(self, self.order(start=world, folder=str(folder), **order), folder)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        shutil.rmtree(self.folder)


def serve() -> None:
    """Fork ranks and wait for them, as orders come in on standard input; what they need is imported before."""
    for module in IMPORTED:
        importlib.import_module(module)
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")  # of what DeepSpeed imports
        for module in DEEPSPEED:
            importlib.import_module(module)
    sys.modules["PIL.Image"].init()
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()  # a fork copies no page only because its collector has looked at it
    replies = os.dup(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            reply = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            reply = []
            for rank in range(order["start"]):
                pid = os.fork()
                if pid == 0:
                    os.close(replies)
                    be_rank(rank, order)
                reply.append(pid)
        os.write(replies, json.dumps(reply).encode() + b"\n")


def be_rank(rank: int, order: dict[str, Any]) -> None:
    """One rank's whole life: its environment, its output files, its call."""
    os.environ.update(order["env"], RANK=str(rank), LOCAL_RANK=str(rank))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(order["folder"]) / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module, _, function = order["call"].partition(":")
    try:
        code = getattr(importlib.import_module(module), function)(*order["arguments"])
    except Exception:
        traceback.print_exc()
        code = 1
    gc.unfreeze()  # so that the interpreter takes itself apart as it always does
    sys.exit(code)


if __name__ == "__main__":
    serve()
