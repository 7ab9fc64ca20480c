"""What a run's end is to a script that started it through a launcher: the launcher's own exit code."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
from ranks import ROOT, free_port

from mitrain.training import state

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mitrain"]
LOCAL = ["bash", str(ROOT / "launch/local.sh"), "2"]
DEEPSPEED = ["bash", str(ROOT / "launch/deepspeed.sh"), "2"]
LAUNCHERS = [
    pytest.param(TORCHRUN, id="torchrun"),
    pytest.param(LOCAL, id="local"),
    pytest.param(DEEPSPEED, id="deepspeed", marks=needs_deepspeed),
]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("launcher", LAUNCHERS)]


def begun(launcher, world, environment, folder, *words) -> subprocess.Popen:
    command = [*launcher, "train", str(world / "config.yaml"), "--run-dir", str(folder), "--json", *words]
    env = {**environment, "MASTER_PORT": str(free_port())}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True, **pipes)


def test_a_mistake(launcher, world, environment, tmp_path):
    """torchrun makes every failure of a rank a 1; the others pass the rank's 2 on."""
    process = begun(launcher, world, environment, tmp_path / "run", "train.stepz=3")
    _, said = process.communicate(timeout=900)
    assert said.count("stepz") >= 1 and process.returncode == (1 if launcher is TORCHRUN else 2), said


def test_the_end(launcher, world, environment, tmp_path):
    process = begun(launcher, world, environment, tmp_path / "run")
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0 and (tmp_path / "run/summary.json").exists(), said


def in_training(launcher, world, environment, folder) -> subprocess.Popen:
    """A run without end, which has made its first step."""
    process = begun(launcher, world, environment, folder, "train.steps=100000", "train.eval_every=100000")
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.1)
    return process


def test_a_rank_that_is_preempted(launcher, world, environment, tmp_path):
    """One rank hears of it; all save and end with 75, which torchrun alone makes a 1."""
    process = in_training(launcher, world, environment, tmp_path / "run")
    os.kill(state.read(tmp_path / "run")["pid"], signal.SIGUSR1)
    _, said = process.communicate(timeout=900)
    assert process.returncode == (1 if launcher is TORCHRUN else 75), said
    told = state.read(tmp_path / "run")
    assert (told["state"], told["why"], told["exit_code"]) == ("preempted", "SIGUSR1", 75)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")) and "stopped by SIGTERM" not in said, said


def test_a_launcher_that_is_asked_to_end(launcher, world, environment, tmp_path):
    """torchrun hands SIGTERM on to the ranks, which save after their step; deepspeed ends at once, and the ranks with it."""
    process = in_training(launcher, world, environment, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=900)
    if launcher is DEEPSPEED:
        assert process.returncode and "the launcher has ended, and this rank with it" in said, said
        return
    assert "SIGTERM: stopping after this step" in said, said
    assert process.returncode == (1 if launcher is TORCHRUN else 128 + signal.SIGTERM), said
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")), said
