"""Trackers get what the file gets; one that fails, hangs or is missing costs a run nothing but a line."""

import importlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_telemetry import lines, train

from mitrain.core import launchers
from mitrain.core.errors import MissingExtraError
from mitrain.training import schema, trackers
from mitrain.training.telemetry import Metrics
from mitrain.training.tracker_process import automatic_mode, has_key
from mitrain.training.trackers import TelemetryConfig, Trackers, WandbConfig


def made(folder, settings, names=("wandb",), **more) -> Trackers:
    return Trackers(TelemetryConfig(trackers=names), WandbConfig(), folder, settings, **more)


FAKE = """
import json, os, sys, time
class Settings:
    base_url = "http://localhost:1"
    def __init__(self, **settings):
        self.given = settings
class Run:
    def log(self, values, step):
        note([step, values])
        {log}
    def finish(self):
        note("finished")
        {finish}
def note(what):
    print(json.dumps(what), file=open({notes!r}, "a"))
def init(settings, **options):
    note([options, settings.given])
    {init}
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Installs a package of that name that does something at ``log``, ``finish`` or ``init``; returns what it was told."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def install(log: str = "pass", finish: str = "pass", init: str = "pass"):
        (tmp_path / "packages").mkdir()
        notes = tmp_path / "notes"
        text = FAKE.format(log=log, finish=finish, init=init, notes=str(notes))
        (tmp_path / "packages" / "wandb.py").write_text(text)
        importlib.invalidate_caches()
        return lambda: lines(notes)

    return install


def reported(tmp_path, steps: int = 5, wait=lambda board: None) -> None:
    """Train ``steps`` steps with wandb; each of them is in the file, whatever wandb does."""
    board = made(tmp_path / "quickstart-2026", {"lr": 0.1})
    metrics = Metrics(tmp_path / "m.jsonl", steps, board=board)
    train(metrics, 1, 1)
    wait(board)
    train(metrics, 2, steps)
    metrics.close()
    assert [line["step"] for line in lines(tmp_path / "m.jsonl")] == list(range(1, steps + 1))


def test_wandb_gets_what_the_file_gets(tmp_path, wandb, caplog):
    told = wandb()
    reported(tmp_path, 3)
    (options, settings), *logged, end = told()
    assert [step for step, _ in logged] == [1, 2, 3] and end == "finished"
    assert logged[0][1]["train/loss"] == 1.0 and logged[0][1]["train/samples"] == 8
    assert options["config"] == {"lr": 0.1} and options["mode"] == "offline"
    assert (options["id"], options["resume"]) == ("quickstart-2026", "allow")
    assert settings == {"silent": True, "console": "off"} and not caplog.records


def ended(board: Trackers) -> None:
    board.each[0].process.wait(60)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({"log": 'raise ConnectionError("server gone")'}, "ConnectionError: server gone"),
        ({"log": "sys.exit(3)"}, "SystemExit: 3"),
        ({"log": "os._exit(7)"}, "its process ended with 7"),
        ({"init": "raise AttributeError('init')"}, "AttributeError: init"),
        ({"init": "sys.exit()"}, "SystemExit: "),
        ({"finish": "raise OSError('disk')"}, "OSError: disk"),
        ({"finish": "os.kill(os.getpid(), 9)"}, "its process ended with -9"),
    ],
)
def test_wandb_failing_is_said_once_and_the_run_goes_on(tmp_path, wandb, caplog, where, why):
    told = wandb(**where)
    reported(tmp_path, wait=ended if "finish" not in where else lambda board: None)
    assert [record.getMessage() for record in caplog.records] == [f"wandb failed ({why}): going on without it"]
    assert len(told()) <= 2 or "finish" in where


def test_wandb_hanging_holds_nothing_up_and_is_left_at_the_end(tmp_path, wandb, caplog, monkeypatch):
    """Far more is reported than a pipe takes."""
    monkeypatch.setattr(trackers, "FINISH_S", 0.3)
    wandb(log="time.sleep(600)")
    boards = []
    reported(tmp_path, 600, wait=lambda board: boards.append(board.each[0].process))
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed (it has not finished in 0.3 s): going on without it"
    ]
    assert boards[0].returncode == -9


def test_wandb_that_lags_too_far_behind_is_given_up(tmp_path, wandb, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "MOST_KEPT", 1000)
    wandb(log="time.sleep(600)")
    reported(tmp_path, 600)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("wandb failed (it does not take its numbers, ")


def test_wandb_is_not_started_unless_enabled_and_named_if_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    board = made(tmp_path, {}, ())
    board.log({"a": 1}, step=1)
    board.finish()
    with pytest.raises(MissingExtraError, match=r"mitrain\[wandb\]"):
        made(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorboard", r"pip install 'mitrain\[tensorboard\]'"),
        ("mlflow", "pip install mlflow"),
        ("trackio", "trackio$"),
    ],
)
def test_a_tracker_that_is_not_installed_is_one_line_that_says_how(tmp_path, monkeypatch, name, said):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=f"telemetry.trackers={name}.*{said}"):
        made(tmp_path, {}, (name,))


def test_one_that_hangs_takes_nothing_from_another(tmp_path, wandb, caplog, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wandb(log="time.sleep(600)")
    board = made(tmp_path / "run", {}, ("wandb", "tensorboard"))
    board.each[0].log({"x": "x" * (1 << 17)}, 1)  # more than its pipe takes
    for step in (1, 2, 3):
        board.log({"train/loss": 1 / step}, step)
    board.each[1].process.stdin.close()
    board.each[1].process.wait(60)
    monkeypatch.setattr(trackers, "FINISH_S", 0.1)
    board.finish()
    assert scalars(events, tmp_path / "run", "train/loss") == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}
    assert [r.getMessage() for r in caplog.records] == ["wandb failed (it has not finished in 0.1 s): going on without it"]


def scalars(events, run: Path, tag: str) -> dict[int, float]:
    """What TensorBoard's own reader finds."""
    read = events.EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    return {event.step: event.value for event in read.Scalars(tag)}


def test_tensorboard_shows_a_resumed_run_without_the_steps_that_were_taken_back(tmp_path, caplog):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, scale in ((1, 5, 1.0), (4, 6, 10.0)):  # killed at 5, resumed from the checkpoint of step 3
        board = made(tmp_path / "run", {"lr": 0.1}, ("tensorboard",), step=first - 1)
        for step in range(first, last + 1):
            board.log({"train/loss": scale * step, "train/skipped": "text", "val/clashes": {"object": 2}}, step)
        board.finish()
    assert caplog.records == []
    assert scalars(events, tmp_path / "run", "train/loss") == {1: 1, 2: 2, 3: 3, 4: 40, 5: 50, 6: 60}
    assert set(scalars(events, tmp_path / "run", "val/clashes/object").values()) == {2}


def test_mlflow_goes_on_in_the_run_of_its_name(tmp_path, caplog, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where it puts the configuration, as mlruns/
    monkeypatch.setattr(trackers, "FINISH_S", 300.0)  # it makes its data base
    for step in (1, 2):
        board = made(tmp_path / "it's a run", {"lr": 0.1}, ("mlflow",), step=step - 1)
        board.log({"train/loss": 1 / step, "val/iou@0.5": {"a b": 2}}, step)
        board.finish()
    with sqlite3.connect(tmp_path / "mlflow.db") as base:  # its own client warns of what it uses itself
        runs = base.execute("select name, status from runs").fetchall()
        rows = base.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        kept = base.execute("select value from metrics where key = 'val/iou-0.5/a-b'").fetchall()
    assert caplog.records == [] and runs == [("it's a run", "FINISHED")]
    assert rows == [(1, 1.0), (2, 0.5)] and kept == [(2.0,), (2.0,)]


def test_trackio_goes_on_in_the_run_of_its_name(tmp_path, caplog, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "board"))
    for step in (1, 2):
        board = made(tmp_path / "run", {"lr": 0.1}, ("trackio",), step=step - 1)
        board.log({"train/loss": 1 / step}, step)
        board.finish()
    with sqlite3.connect(tmp_path / "board" / "mitrain.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert caplog.records == []
    assert [(name, step, json.loads(m)["train/loss"]) for name, step, m in rows] == [("run", 1, 1.0), ("run", 2, 0.5)]


def test_online_only_with_a_key_and_a_server_that_answers(tmp_path, monkeypatch, wandb):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert automatic_mode(url) == "offline"
        monkeypatch.setenv("WANDB_API_KEY", "k")
        assert automatic_mode(url) == "online"
    assert automatic_mode(url) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert automatic_mode(url) == "disabled"


def test_a_key_may_stand_in_netrc(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_key("my.server")
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine my.server login user password secret\n")
    netrc.chmod(0o600)
    assert has_key("my.server") and not has_key("other.server")
    netrc.write_text("machine")
    assert not has_key("my.server")


def test_the_real_wandb_works_offline_without_a_key(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = made(tmp_path / "run: 1", {"lr": 0.1})
    board.log({"train/loss": 1.0}, step=1)
    board.finish()
    assert caplog.records == []
    assert list(tmp_path.glob("run: 1/wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(("values", "said"), [({}, ""), ({"mode": "online", "project": "x"}, "wandb.mode, wandb.project")])
def test_wandb_settings_without_effect_are_named(caplog, values, said):
    path = "configs/quickstart.yaml"
    given = schema.load(path, [f"wandb.{name}={value}" for name, value in values.items()])
    assert given.telemetry.trackers == () and (said in caplog.text) and (not said) == (not caplog.text)
    caplog.clear()
    wanted = schema.load(path, ["telemetry.trackers=[wandb]", *(f"wandb.{n}={v}" for n, v in values.items())])
    assert wanted.telemetry.trackers == ("wandb",)
    assert schema.from_dict(given.to_dict()) == given and not caplog.text, "a run folder's own configuration"


GONE = """
import os, signal, sys
from mitrain.training import trackers
trackers.HURRY_S = 0.2
board = trackers.Trackers(trackers.TelemetryConfig(trackers=("wandb",)), trackers.WandbConfig(), sys.argv[1], {})
board.log({"loss": 1.0}, step=1)
print(board.each[0].process.pid, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_wandb_that_hangs_ends_soon_after_a_training_that_was_killed(tmp_path, wandb, where):
    told = wandb(**{where: "time.sleep(600)"})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", GONE, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as training:
        helper = int(training.stdout.readline())
        until(lambda: (tmp_path / "notes").exists() and (where != "log" or len(told()) == 2))  # it hangs, or will
        training.communicate(b"now\n")
    assert training.returncode == -9
    until(lambda: launchers.status(helper) is None or not launchers.status(helper)[2])


def until(there) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_was_asked_to_end_does_not_wait_long_for_wandb(tmp_path, wandb, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "HURRY_S", 0.2)
    wandb(finish="time.sleep(600)")
    board = made(tmp_path / "run", {}, asked=lambda: "SIGTERM")
    board.finish()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed (it has not finished in 0.2 s): going on without it"
    ]
