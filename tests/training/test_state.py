"""RUN/state.json and the exit code say the same of how a run ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from folders import colour_world, run_settings

from mitrain.cli import main
from mitrain.core.errors import UserError, exit_code
from mitrain.training import state


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("state"), train=16, val=8, width=48) as path:
        train = {"steps": 4, "batch": 8, "eval_every": 4, "save_every": 2}
        values = run_settings(path, name="one", adapter={"name": "mit", "layers": [1, 2]}, train=train)
        (path / "run.yaml").write_text(json.dumps(values))
        yield path


def trained(world, folder, *words) -> tuple[int, dict]:
    """The exit code, and what the folder says of it."""
    code = main(["train", str(world / "run.yaml"), "--run-dir", str(folder), *words])
    return code, {k: v for k, v in state.read(folder).items() if k not in ("time", "pid", "host")}


def test_a_run_that_is_done_says_so_and_an_extended_one_again(world, tmp_path):
    run = tmp_path / "run"
    done = {"state": "done", "why": "last step", "exit_code": 0}
    assert trained(world, run) == (0, {**done, "step": 4, "steps": 4})
    assert state.read(run)["pid"] == os.getpid() and time.time() - state.read(run)["time"] < 600
    assert trained(world, run, "train.steps=6", "--allow-changes") == (0, {**done, "step": 6, "steps": 6})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_run_that_was_asked_to_stop_is_preempted(world, tmp_path, monkeypatch, number, code):
    from mitrain.training.trainer import Trainer

    own = Trainer._step

    def step(self):
        os.kill(os.getpid(), number)
        return own(self)

    monkeypatch.setattr(Trainer, "_step", step)
    why = {"state": "preempted", "why": number.name, "exit_code": code}
    assert trained(world, tmp_path / "run") == (code, {**why, "step": 1, "steps": 4})


def test_a_run_that_fails_says_why(world, tmp_path, monkeypatch):
    from mitrain.training.trainer import Trainer

    assert trained(world, tmp_path / "run")[0] == 0
    own = Trainer._step

    def broken(error):
        def step(self):
            if self.saved == 4:
                raise error
            return own(self)

        return step

    words = ("train.steps=8", "--allow-changes")
    monkeypatch.setattr(Trainer, "_step", broken(UserError("the disk is gone: mend it")))
    failed = {"state": "failed", "exit_code": 2, "step": 4, "steps": 4}
    assert trained(world, tmp_path / "run", *words) == (2, {**failed, "why": "the disk is gone: mend it"})
    monkeypatch.setattr(Trainer, "_step", broken(ZeroDivisionError("of what")))
    with pytest.raises(ZeroDivisionError):
        trained(world, tmp_path / "run", *words)
    assert state.in_words(state.read(tmp_path / "run")) == "failed (ZeroDivisionError: of what)"
    assert state.read(tmp_path / "run")["exit_code"] == 1


def test_a_configuration_that_is_refused_leaves_no_folder(world, tmp_path):
    assert main(["train", str(world / "run.yaml"), "--run-dir", str(tmp_path / "run"), "data.root=/nowhere"]) == 2
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_gone_or_silent_is_no_running_one():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = {"state": "running", "time": time.time(), "host": socket.gethostname()}
    assert state.in_words({**here, "pid": ended.pid}) == f"died (process {ended.pid} on {here['host']} is gone)"
    assert state.in_words({**here, "pid": os.getpid()}).startswith("running (process ")
    there = {**here, "pid": 1, "host": "elsewhere"}
    assert state.in_words(there) == "running (process 1 on elsewhere)"
    assert state.in_words({**there, "time": time.time() - 7200}) == "silent for 120 minutes (process 1 on elsewhere)"


def test_damage_and_a_moved_folder_are_no_reason_to_fail(tmp_path):
    for text in ("{", "[]", "\x00"):
        (tmp_path / "state.json").write_text(text)
        assert state.read(tmp_path) == {}
    state.RunState(tmp_path / "gone").say("done")
    assert not (tmp_path / "gone").exists()
    assert state.in_words({"state": "running", "pid": "x", "host": socket.gethostname()}).startswith("died")


def test_a_run_says_how_far_it_is_now_and_then(tmp_path, monkeypatch):
    told = state.RunState(tmp_path)
    told.say("running")
    told.beat(3, 9)
    assert state.read(tmp_path).get("step") is None, "not at every step"
    monkeypatch.setattr(state, "EVERY_S", -1.0)
    told.beat(4, 9)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 4


def test_exit_codes():
    interrupted = KeyboardInterrupt()
    interrupted.number = signal.SIGTERM
    memory = RuntimeError("[enforce fail at x] DefaultCPUAllocator: can't allocate memory")
    assert [exit_code(error) for error in (interrupted, KeyboardInterrupt())] == [143, 130]
    mapped = RuntimeError("unable to mmap 9 bytes from file <model.safetensors>: Cannot allocate memory (12)")  # torch's
    assert {exit_code(error) for error in (UserError("x"), OSError(), memory, mapped, MemoryError())} == {2}
    assert [exit_code(error) for error in (BrokenPipeError(), KeyError(), RuntimeError())] == [141, 1, 1]
