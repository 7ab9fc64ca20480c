"""A rank ends with its launcher, and what nobody launched goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mitrain.core import launchers
from mitrain.core.launchers import Process, is_launcher, status

ROOT = Path(__file__).resolve().parents[2]
RANK = """from mitrain.core import launchers
launchers.end_with_launcher()
print(len(launchers.launchers()), flush=True)
input()
"""
PARENT = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {RANK!r}]))"


@pytest.mark.parametrize(
    "command",
    [
        "/venv/bin/python -m torch.distributed.run --standalone -m mitrain train x.yaml",
        "/venv/bin/python /venv/bin/torchrun --nproc-per-node 2 -m mitrain train x.yaml",
        "python -u -m deepspeed.launcher.launch --world_info=x",
        "python -W error -m deepspeed.launcher.runner --num_gpus 2",
        "/usr/bin/env deepspeed --module mitrain",
        "torchrun x.py",
    ],
)
def test_launchers_are_known_by_their_command_lines(command):
    assert is_launcher(command.split())
    assert is_launcher(["slurmstepd: [12.0]"])


@pytest.mark.parametrize(
    "command",
    [
        "",
        "bash launch/deepspeed.sh 2 train x.yaml",
        "python -m pytest tests/launch/test_deepspeed.py",
        "vim torchrun.md",
    ],
)
def test_others_are_not(command):
    assert not is_launcher(command.split(" "))


@pytest.fixture
def rank(tmp_path):
    """Starts a process below a launcher, or below one that is none; both end with the test."""
    started = []

    def start(name: str, **env: str) -> tuple[subprocess.Popen, int, int]:
        script = tmp_path / name
        script.write_text(PARENT)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        parent = subprocess.Popen([sys.executable, str(script)], env=environment, **pipes)
        started.append(parent)
        watched = int(parent.stdout.readline())
        (pid,) = (int(p) for p in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
        return parent, pid, watched

    yield start
    for parent in started:
        parent.kill()
        parent.wait()
        for stream in (parent.stdin, parent.stdout, parent.stderr):
            stream.close()


def test_a_rank_ends_with_a_launcher_that_is_killed(rank):
    parent, pid, watched = rank("torchrun")
    process = Process(pid, status(pid)[1])
    assert watched == 1 and process.alive()
    parent.kill()
    assert "the launcher has ended" in parent.stderr.read()  # until the rank has closed it, by ending
    while process.alive():
        time.sleep(0.01)


def test_what_a_library_of_torchrun_started_ends_with_it(rank):
    parent, _, watched = rank("own_script.py", TORCHELASTIC_RUN_ID="none")
    assert watched == 1
    parent.kill()
    assert "the launcher has ended" in parent.stderr.read()


def test_what_nobody_launched_goes_on(rank):
    parent, pid, watched = rank("start.py")
    process = Process(pid, status(pid)[1])
    parent.kill()
    parent.wait()
    assert watched == 0 and process.alive()
    parent.stdin.close()
    said = parent.stderr.read()
    assert "EOFError" in said and "launcher has ended" not in said  # of input(): it went on to its own end


def test_a_pid_that_names_another_process_is_not_alive():
    assert launchers.launchers({}) == [] or os.environ.get("TORCHELASTIC_RUN_ID")
    assert not Process(os.getpid(), b"1").alive() and not Process(2**22 + 1, b"1").alive()
