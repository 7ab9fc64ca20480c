"""The suite of faults without its processes: what makes a row red, going on after an interruption, the table."""

import contextlib
import json

import pytest

from benchmarks import results
from benchmarks.command import main
from benchmarks.faults import cases, suite
from benchmarks.faults.lab import Ended, Left
from benchmarks.faults.suite import Case, Found, verdict
from mitrain.core import provenance
from mitrain.core.errors import ConfigError

GOOD = Found(True, "refused", 1.0, 1, True, "mitrain: no")


def case(work=None, **changes) -> Case:
    return Case(**{"name": "a-fault", "group": "training", "work": work or (lambda lab, place: GOOD), "wanted": "refused",
                   "most_lost": 1, "quick": True, **changes})  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"fired": False}, {"end_state": "went on"}, {"end_state": "hung"}, {"lost_steps": 2}, {"resumed_equal": False}],
)
def test_a_fault_that_did_not_fire_or_ended_otherwise_is_red(changes):
    assert verdict(case(), GOOD)
    assert not verdict(case(), Found(**{**vars(GOOD), **changes}))


def test_endings_are_told_apart():
    assert Ended(2, "", "mitrain: no\n", 1.0).state == "refused"
    assert Ended(2, "", "", 1.0).state == "silent 2"
    assert Ended(0, "{}", "", 1.0).state == "went on"
    assert Ended(1, "", "Traceback (most recent call last):\n", 1.0).state == "traceback"
    assert Ended(1, "", "mitrain: no\n", 1.0).state == "code 1"
    assert Ended(-9, "", "", 1.0).state == "SIGKILL"
    assert Ended(None, "", "", 120.0).state == "hung"


def test_a_refusal_is_one_line_that_says_what():
    one = Ended(2, "", "mitrain: seed differs\n", 0.5)
    assert suite.refused_at_start(one, "seed").end_state == "refused"
    assert suite.refused_at_start(one, "lr").end_state == "refused without 'lr'"
    two = Ended(2, "", "mitrain: a\nmitrain: b\n", 0.5)
    assert suite.refused_at_start(two).end_state == "refused in 2 lines"


def test_runs_differ_by_a_loss_a_step_or_a_bit_of_a_tensor():
    import torch

    left = Left({1: 0.5}, {"adapter.a": torch.ones(2)}, 1)
    assert left.equals(Left({1: 0.5}, {"adapter.a": torch.ones(2)}, 1))
    assert not left.equals(Left({1: 0.5000001}, {"adapter.a": torch.ones(2)}, 1))
    assert not left.equals(Left({1: 0.5}, {"adapter.a": torch.ones(2)}, 2))
    assert not left.equals(Left({1: 0.5}, {"adapter.a": torch.tensor([1, 1 + 2**-23])}, 1))
    assert not left.equals(Left({1: 0.5}, {}, 1))


@pytest.fixture
def no_lab(monkeypatch):
    class Lab:
        folder = "/nowhere/lab"

        def scratch(self, name):
            return None

    monkeypatch.setattr(suite, "opened", lambda: contextlib.nullcontext(Lab()))
    for module in (suite, results, provenance):
        monkeypatch.setattr(module, "commit", lambda: "abc1234")


def test_an_interrupted_suite_goes_on_and_keeps_what_was_measured(no_lab, tmp_path):
    calls = []

    def counted(lab, place):
        calls.append(1)
        return GOOD

    def interrupted(lab, place):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suite.faults([case(counted), case(interrupted, name="b-fault")], tmp_path, "x", say=str)
    found = suite.faults([case(counted), case(name="b-fault")], tmp_path, "x", say=str)
    assert len(calls) == 1 and [row["fault"] for row in found["rows"]] == ["a-fault", "b-fault"]
    assert set(found["rows"][0]) >= {"fault", "fired", "detected_s", "lost_steps", "end_state", "resumed_equal"}
    assert json.loads((tmp_path / "results.json").read_text()) == found and not (tmp_path / "rows").exists()
    suite.check(found)


def test_a_case_that_fails_is_a_red_row_and_the_others_are_run(no_lab, tmp_path):
    def broken(lab, place):
        raise OSError("no room in /nowhere/lab/x | y")

    found = suite.faults([case(broken), case(name="b-fault")], tmp_path, "x", say=str)
    assert [row["ok"] for row in found["rows"]] == [False, True]
    with pytest.raises(suite.FaultsError, match="1 of 2 faults .* a-fault") as caught:
        suite.check(found)
    assert caught.value.exit_code == 1
    line = next(line for line in (tmp_path / "table.md").read_text().splitlines() if "a-fault" in line)
    assert "…/x &#124; y" in line and "**wanted refused**" in line


def test_cases_are_chosen_by_name_and_the_quick_ones_touch_every_theme():
    quick = suite.chosen(cases.CASES, True, [])
    assert {c.group for c in quick} == {c.group for c in cases.CASES.values()}
    assert {c.name for c in suite.chosen(cases.CASES, False, ["cache"])} >= {"cache-of-nan", "cache-rows-moved"}
    with pytest.raises(ConfigError, match="names no fault"):
        suite.chosen(cases.CASES, False, ["cahce"])


def test_a_misspelt_name_is_refused_before_anything_is_made(tmp_path, capsys):
    assert main(["faults", "--only", "nothing-like-it", "--out", str(tmp_path / "out")]) == 2
    assert "names no fault" in capsys.readouterr().err and not (tmp_path / "out").exists()
