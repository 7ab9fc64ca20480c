"""mitrain train --profile: a trace that Chrome reads, and where a step's time goes."""

import json

import pytest
from folders import own_cache
from methods_world import configured, make_world

from mitrain.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with own_cache(make_world(tmp_path_factory.mktemp("profile"))) as path:
        yield path


def test_a_profile_has_a_trace_and_a_page_by_part(world, capsys):
    path = configured(world, "mit", "classify", train={"steps": 6, "batch": 4})
    assert main(["train", str(path), "--profile", "--run-dir", str(world / "run")]) == 0
    names = {event["name"] for event in json.loads((world / "run/profile/trace.json").read_text())["traceEvents"]}
    assert {f"mitrain: {part}" for part in ("changed layers", "adapter", "head", "optimizer", "input")} <= names
    page = (world / "run/profile/summary.md").read_text()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")][2:]
    ms = {part: (float(forward), float(backward)) for part, forward, backward, _ in cells}
    assert all(ms[part][0] > 0 for part in ("changed layers", "adapter", "head", "optimizer"))
    assert ms["input"][0] >= 0 == ms["input"][1]  # a batch that was made ahead is waited for in no time
    assert ms["changed layers"][1] > 0 and ms["head"][1] > 0
    assert ms["communication"] == (0, 0) and page in capsys.readouterr().out


def test_a_run_that_is_too_short_says_so(world, capsys):
    path = configured(world, "mit", "classify", train={"steps": 2, "batch": 4})
    assert main(["train", str(path), "--profile", "--run-dir", str(world / "short")]) == 0
    assert "no profile: the run ended before its step 5" in capsys.readouterr().out
