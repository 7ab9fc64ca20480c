"""kill -9 while checkpoints are written: the newest complete one is at most one step behind, and never torn."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mitrain import checkpoint

HERE = Path(__file__).resolve().parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


class Worker:
    """The process of crash_worker.py; one child at a time."""

    def __init__(self) -> None:
        command = [sys.executable, str(HERE / "crash_worker.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)

    def line(self) -> tuple[str, int]:
        word, number = self.process.stdout.readline().split()
        return word, int(number)

    def start(self, *command: object) -> int:
        self.process.stdin.write(" ".join(map(str, command)) + "\n")
        self.process.stdin.flush()
        word, pid = self.line()
        while word != "pid":
            word, pid = self.line()
        return pid

    def wait(self) -> tuple[int, int]:
        """(the last step that was saved or 0, the exit status)"""
        last, (word, number) = 0, self.line()
        while word == "done":
            last, (word, number) = number, self.line()
        return last, number

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def hidden(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob(".step-*"))


def test_kills_at_random_moments_lose_at_most_the_step_being_written(worker, tmp_path):
    moments, saved, torn = random.Random(0), 0, 0
    for _ in range(15):
        pid = worker.start("loop", tmp_path)
        time.sleep(moments.uniform(0.01, 0.25))
        os.kill(pid, signal.SIGKILL)
        last, status = worker.wait()
        assert status == -signal.SIGKILL
        saved = max(saved, last)
        newest = checkpoint.latest(tmp_path)
        step = checkpoint.load(newest).step if newest else 0
        assert saved <= step <= saved + 1
        saved, torn = step, torn + bool(hidden(tmp_path))
    assert saved > 0 and torn > 0, "no kill fell into a write"


def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new(worker, tmp_path):
    """Every operation of one save in turn, each on a copy of a run with old checkpoints and an unfinished one."""
    template, run = tmp_path / "template", tmp_path / "run"
    for step in range(1, 4):
        worker.start("once", template, 0)
        assert worker.wait() == (step, 0)
    shutil.copytree(template / "checkpoints" / "step-00000003", template / "checkpoints" / ".step-00000004.abandoned")
    operation, status, outcomes = 0, -signal.SIGKILL, []
    while status == -signal.SIGKILL:
        operation += 1
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        worker.start("once", run, operation)
        _, status = worker.wait()
        outcomes.append(checkpoint.load(checkpoint.latest(run)).step)
        visible = list((run / "checkpoints").glob("step-*"))
        assert all(checkpoint.verify(path) for path in visible), "a half-removed checkpoint is visible"
    assert status == 0 and operation > 20
    assert outcomes == sorted(outcomes) and set(outcomes) == {3, 4}
    assert hidden(run) == []
