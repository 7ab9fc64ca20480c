"""What the ranks of test_rank_killed.py do: train, and at one moment one of them is killed or falls silent.

The signal comes from the rank itself, at a counted call: nothing depends on time.
"""

import ctypes
import os
import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import torch
from crash_worker import Killer

import mitrain.training.trainer
from benchmarks.faults.inject import before
from mitrain.cli import main
from mitrain.training import checkpoint, stragglers
from mitrain.training.engine import LocalEngine
from mitrain.training.prefetch import Batches
from mitrain.training.trainer import Trainer


def train(*arguments: str) -> int:
    torch.set_num_threads(1)
    return main(["train", *arguments])


def train_and_fail(rank: str, moment: str, how: str, *arguments: str) -> int:
    """Train; RANK gets the signal HOW at MOMENT: in-step, evaluate, or save-N (before the N-th file operation)."""
    if os.environ["RANK"] == rank:
        fail_at(moment, signal.Signals[how])
    return train(*arguments)


def fail_at(moment: str, how: signal.Signals) -> None:
    if moment == "in-step":  # two micro-batches a step: between those of step 4
        before(Trainer, "_accumulate", 8, lambda: os.kill(os.getpid(), how))
    elif moment == "evaluate":
        before(mitrain.training.trainer, "evaluate", 2, lambda: os.kill(os.getpid(), how))
    else:
        operation = int(moment.removeprefix("save-"))
        before(checkpoint, "save", 2, lambda: Killer(operation).__enter__())


def train_on_hosts(first: str, second: str, *arguments: str) -> int:
    """Train with rank 0 in one network namespace and rank 1 in another, whose network goes down within step 4."""
    host = (first, second)[int(os.environ["RANK"])]
    with open(f"/run/netns/{host}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")
    if host == second:
        before(Trainer, "_accumulate", 8, lambda: subprocess.run(["ip", "link", "set", "eth0", "down"], check=True))
    return train(*arguments)


def train_unevenly(part: str, *arguments: str) -> int:
    """Train with a clock of its own, by which PART of each micro-batch takes a second on rank 1, a tenth on the others."""
    now = [0.0]
    stragglers.time = SimpleNamespace(perf_counter=lambda: now[0])
    owner, name = {"input": (Batches, "of"), "compute": (LocalEngine, "backward")}[part]
    call = getattr(owner, name)

    def timed(*args: Any) -> Any:
        now[0] += 1.0 if os.environ["RANK"] == "1" else 0.1
        return call(*args)

    setattr(owner, name, timed)
    return train(*arguments)
