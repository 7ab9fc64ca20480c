"""The metrics file through interruptions, the console line and the stopwatch's sums."""

import io
import json

import numpy as np
import pytest
import torch

from mitrain.core.errors import UserError
from mitrain.training import telemetry
from mitrain.training.telemetry import Metrics, Stopwatch, amount, duration, plain


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


def test_a_terminal_shows_a_bar_and_a_log_the_same_lines_without(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = {}
    for kind in (Terminal, io.StringIO):
        metrics = Metrics(tmp_path / "m.jsonl", total_steps=6, console=kind(), every=2, resumed_step=2)
        train(metrics, 3, 6)
        metrics.close()
        shown[kind] = metrics.console.getvalue()
    assert "\r" not in shown[io.StringIO] and len(shown[io.StringIO].splitlines()) == 2
    assert "train:" in shown[Terminal] and "/6 [" in shown[Terminal] and "step/s" in shown[Terminal]
    for line in shown[io.StringIO].splitlines():
        assert line.partition("  memory")[0] in shown[Terminal]
    assert shown[Terminal].rpartition("\r")[2].strip() == "", "the bar is gone at the end"


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
