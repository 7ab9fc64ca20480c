"""The metrics file through interruptions, the console line, the stopwatch's sums, and a wandb that fails."""

import importlib
import io
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mitrain.core import launchers
from mitrain.core.errors import MissingExtraError, UserError
from mitrain.training import telemetry
from mitrain.training.telemetry import Metrics, Stopwatch, Wandb, WandbConfig, amount, duration, plain
from mitrain.training.wandb_process import automatic_mode, has_key


def train(metrics: Metrics, first: int, last: int, **changes) -> None:
    for step in range(first, last + 1):
        values = {"loss": 1 / step, "lr": 1e-3, "grad_norm": 0.5, "samples": 8, "tokens": 400, "seconds": 0.5}
        metrics.step(step, **(values | changes))


def lines(path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_every_step_and_event_is_one_strict_json_line_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = Metrics(path, total_steps=3)
    train(metrics, 1, 1)
    assert [line["step"] for line in lines(path)] == [1], "not written before the next step"
    train(metrics, 2, 2, loss=float("nan"), skipped="non-finite loss")
    metrics.event("val", 2, {"accuracy": np.float32(0.5), "confusion": torch.eye(2), "worst": -torch.inf, "n": 3})
    metrics.close()
    first, second, third = lines(path)
    assert {"kind": "train", "loss": 1.0, "samples": 8, "tokens": 400, "seconds": 0.5}.items() <= first.items()
    assert "skipped" not in first and first["memory"] > 0 and first["time"] > 0
    assert second["skipped"] == "non-finite loss" and second["loss"] is None
    values = {"kind": "val", "step": 2, "accuracy": 0.5, "confusion": [[1, 0], [0, 1]], "worst": None, "n": 3}
    assert values.items() <= third.items()


def test_a_resumed_run_goes_on_behind_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, total_steps=9)
    train(metrics, 1, 4)
    metrics.event("val", 4, {"accuracy": 0.25})
    train(metrics, 5, 7)
    metrics.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "step": 3')  # torn by kill -9
    resumed = Metrics(path, total_steps=9, resumed_step=4)
    assert [(line["kind"], line["step"]) for line in lines(path)] == [*(("train", s) for s in (1, 2, 3, 4)), ("val", 4)]
    train(resumed, 5, 5)
    resumed.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 4, 5]


JUNK = [b"\x00\xff\n", b"[1]\n", b"3\n", b'{"step": "1"}\n', b'{"step": true}\n', b"\n", b'{"step": 1}']


@pytest.mark.parametrize("junk", JUNK)
def test_lines_that_are_none_are_dropped_on_resume(tmp_path, junk):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "kind": "train"}\n'
    path.write_bytes(good + junk)
    Metrics(path, total_steps=9, resumed_step=1).close()
    assert path.read_bytes() == good


def test_a_failing_disk_is_one_line(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl", total_steps=9)
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - the metrics close it
    metrics._file.close()
    monkeypatch.setattr(metrics, "_file", full)
    with pytest.raises(UserError, match="metrics.jsonl.*No space left.*resume"):
        train(metrics, 1, 1)
    metrics.close()


def test_the_console_line(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "memory_bytes", lambda: 3 * 2**29)
    console = io.StringIO()
    metrics = Metrics(tmp_path / "m.jsonl", total_steps=110, console=console, every=4)
    train(metrics, 1, 6)
    train(metrics, 7, 8, seconds=1.5)
    metrics.event("val", 8, {"accuracy": 0.73441, "samples": 300})
    metrics.close()
    assert console.getvalue().splitlines() == [
        "step   4/110  loss 0.2500  lr 1.00e-03  16 samples/s  800 tokens/s  memory 1.5 GiB  eta 53 s",
        "step   8/110  loss 0.1250  lr 1.00e-03  8 samples/s  400 tokens/s  memory 1.5 GiB  eta 1:16",
        "step   8/110  val  accuracy 0.7344  samples 300",
    ]


def test_a_skipped_step_and_the_last_one_are_always_shown(tmp_path):
    console = io.StringIO()
    metrics = Metrics(tmp_path / "m.jsonl", total_steps=3, console=console, every=100)
    train(metrics, 1, 1)
    train(metrics, 2, 2, loss=float("nan"), skipped="non-finite loss")
    train(metrics, 3, 3)
    metrics.close()
    skipped, last = console.getvalue().splitlines()
    assert skipped == "step 2/3  skipped: non-finite loss" and last.startswith("step 3/3  loss 0.3333")


def test_without_a_console_nothing_is_printed(tmp_path, capfd):
    metrics = Metrics(tmp_path / "m.jsonl", total_steps=2, every=1)
    train(metrics, 1, 2, skipped="no samples")
    metrics.event("val", 2, {"accuracy": 1.0})
    metrics.close()
    assert capfd.readouterr() == ("", "")


def test_numbers_for_people():
    assert [amount(x) for x in (0.4216, 41.23, 999, 1240, 3_100_000)] == ["0.422", "41.2", "999", "1.24k", "3.1M"]
    assert [duration(x) for x in (0, 45.4, 133, 3723, float("inf"))] == ["0 s", "45 s", "2:13", "1:02:03", "unknown"]
    assert plain({1: (np.int64(2), torch.tensor([1.5, torch.nan]))}) == {"1": [2, [1.5, None]]}
    assert telemetry.memory_bytes() > 2**24


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_stopwatch_charges_each_second_once():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 1
    with watch.phase("train"):
        clock.now += 10
        with watch.phase("evaluate"):
            clock.now += 5
        clock.now += 20
    with pytest.raises(RuntimeError), watch.phase("evaluate"):
        clock.now += 2
        raise RuntimeError
    clock.now += 2
    assert watch.report() == {"train": 30, "evaluate": 7, "other": 3}
    assert watch.table().splitlines() == [
        "where the time went (40 s in all)",
        "  train         30.0 s   75 %",
        "  evaluate       7.0 s   18 %",
        "  other          3.0 s    8 %",
    ]


def test_the_stopwatch_reports_inside_a_phase():
    clock = Clock()
    watch = Stopwatch(clock)
    assert watch.table().startswith("where the time went (0 s in all)")
    with watch.phase("train"):
        clock.now += 3
        assert watch.report() == {"train": 3, "other": 0}
        clock.now += 1
    assert watch.report() == {"train": 4, "other": 0}


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
    board = Wandb(WandbConfig(enabled=True), tmp_path / "quickstart-2026", {"lr": 0.1})
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


def ended(board: Wandb) -> None:
    board.process.wait(60)


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
    monkeypatch.setattr(telemetry, "FINISH_S", 0.3)
    wandb(log="time.sleep(600)")
    boards = []
    reported(tmp_path, 600, wait=lambda board: boards.append(board.process))
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed (it has not finished in 0.3 s): going on without it"
    ]
    assert boards[0].returncode == -9


def test_wandb_that_lags_too_far_behind_is_given_up(tmp_path, wandb, caplog, monkeypatch):
    monkeypatch.setattr(telemetry, "MOST_KEPT", 1000)
    wandb(log="time.sleep(600)")
    reported(tmp_path, 600)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("wandb failed (it does not take its numbers, ")


def test_wandb_is_not_started_unless_enabled_and_named_if_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    board = Wandb(WandbConfig(), tmp_path, {})
    board.log({"a": 1}, step=1)
    board.finish()
    with pytest.raises(MissingExtraError, match=r"mitrain\[wandb\]"):
        Wandb(WandbConfig(enabled=True), tmp_path, {})


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
    board = Wandb(WandbConfig(enabled=True), tmp_path / "run: 1", {"lr": 0.1})
    board.log({"train/loss": 1.0}, step=1)
    board.finish()
    assert caplog.records == []
    assert list(tmp_path.glob("run: 1/wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("values", "said"), [({}, ""), ({"mode": "online", "project": "x"}, "wandb.mode, wandb.project")]
)
def test_wandb_settings_without_effect_are_named(caplog, values, said):
    assert not WandbConfig(**values).enabled
    assert (said in caplog.text) and (not said) == (not caplog.text)
    caplog.clear()
    assert not WandbConfig(enabled=False, **values).enabled and WandbConfig(enabled=True, **values).enabled
    assert not caplog.text


GONE = """
import os, signal, sys
from mitrain.training import telemetry
telemetry.HURRY_S = 0.2
board = telemetry.Wandb(telemetry.WandbConfig(enabled=True), sys.argv[1], {})
board.log({"loss": 1.0}, step=1)
print(board.process.pid, flush=True)
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
    monkeypatch.setattr(telemetry, "HURRY_S", 0.2)
    wandb(finish="time.sleep(600)")
    board = Wandb(WandbConfig(enabled=True), tmp_path / "run", {}, asked=lambda: "SIGTERM")
    board.finish()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed (it has not finished in 0.2 s): going on without it"
    ]
