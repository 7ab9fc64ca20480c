"""What ``mitrain bench`` does around its benchmarks: a tiny model's steps, the kernels, the command to repeat."""

import json
import os
import subprocess
from subprocess import CompletedProcess

import pytest
from ranks import make_world

from benchmarks import command, ranks, results, start, step
from benchmarks.command import main, parser
from mitrain import cli


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    return make_world(tmp_path / "world")


def here(work, arguments, count, limit_s):
    """Stands in for a process of its own."""
    out = arguments[0] + ".json"
    work(*arguments, out)
    with open(out) as file:
        return json.load(file)


def test_steps_are_the_trainers_own_and_their_bytes_add_up(world, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ranks, "found", here)
    path = str(world / "config.yaml")
    assert main(["step", "--configs", path, "--steps", "3", "--json", "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert len(row["losses"]) == 3 + step.WARM_UP and row["losses"][-1] < row["losses"][0]
    assert 0 < row["q20_ms"] <= row["step_ms"] <= row["q80_ms"]
    assert row["peak_bytes"] == sum(row["bytes"].values()) > row["saved_bytes"] > 0
    made = json.loads((tmp_path / "out" / "results.json").read_text())
    assert made["rows"] == [row] and made["made"]["command"].startswith("mitrain bench step --configs ")
    assert f"| {row['losses'][-1]:.6f} |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("words", [["--configs", "nowhere.yaml"], ["--steps", "-1"]])
def test_bad_steps_are_one_line(words, capsys):
    assert main(["step", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_starts_are_timed_in_turns_and_their_medians_compared(monkeypatch, capsys, tmp_path):
    seconds = iter([8.0, 6.0, 4.0, 0.5, 10.0, 6.0, 4.0, 0.7, 9.0, 5.0, 4.5, 0.6])
    asked = []
    monkeypatch.setattr(start, "start", lambda tree, config, cache: asked.append((tree, cache)) or next(seconds))
    words = ["--pictures", "40", "--before", str(tmp_path / "old"), "--out", str(tmp_path / "out")]
    assert main(["start", *words]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| empty | 9.00 | 4.00 | 2.2 |" in table and "| filled | 6.00 | 0.60 | 10.0 |" in table
    assert [tree.name for tree, _ in asked[:4]] == ["old", "old", start.HERE.name, start.HERE.name]
    assert len({cache for _, cache in asked}) == 6  # a start of an empty cache and one of the same, filled
    assert main(["start", "--pictures", "1"]) == 2


@pytest.mark.parametrize(("code", "printed"), [(0, '{"rows": [1]}'), (1, '{"red": [1]}'), (2, "")])
def test_the_kernels_have_a_command_of_their_own(code, printed, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        command.subprocess, "run", lambda words, **_: asked.append(words[1:]) or CompletedProcess(words, code, printed)
    )
    assert main(["kernels", "--quick", "--json"]) == code
    assert asked == [[str(command.KERNELS), "--quick", "--json"]] and (command.KERNELS / "__main__.py").is_file()
    told = capsys.readouterr()
    assert json.loads(told.out or "null") == json.loads(printed or "null")
    assert bool(code) == ("stands above" in told.err)


def test_the_command_that_makes_results_again():
    words = ["parity", "--quick", "--only", "ours-int8", "peft", "--steps", "3", "--out", "a b", "--json"]
    assert command.again(parser().parse(words)) == "mitrain bench parity --quick --only ours-int8 peft --steps 3 --out 'a b'"
    assert command.again(parser().parse(["load"])) == "mitrain bench load"


@pytest.mark.parametrize("name", ["parity", "faults", "load", "step", "memory", "ledger", "kernels"])
def test_every_benchmark_takes_quick_and_json(name):
    found = parser().parse([name, "--quick", "--json"])
    assert found.quick and found.json and found.verb == name


def test_the_command_starts_the_program_of_the_repository_in_its_place(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append((program, words[1:])))
    cli.main(["bench", "step", "--help"])
    ((program, (file, *words)),) = started
    assert words == ["step", "--help"]
    shown = subprocess.run([program, file, *words], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage: mitrain bench step ")


def test_a_row_is_taken_over_for_its_identity_alone(tmp_path):
    counted = []

    def measure():
        counted.append(1)
        return {"value": len(counted)}

    assert results.row(tmp_path, "a", "x", measure)["value"] == 1
    assert results.row(tmp_path, "a", "x", measure)["value"] == 1
    assert results.row(tmp_path, "a", "y", measure)["value"] == 2
    assert results.row(tmp_path, "a", None, measure)["value"] == 3
    assert results.row(tmp_path, "a", None, measure)["value"] == 4, "without an identity nothing is known of it"
    (tmp_path / "rows" / "a.json").write_text('{"torn')
    assert results.row(tmp_path, "a", "x", measure)["value"] == 5
    assert results.row(tmp_path, "b", "x", lambda: {"error": "fell"})["error"] == "fell"
    assert results.row(tmp_path, "b", "x", measure)["value"] == 6
    results.write(tmp_path, {"rows": []}, "table")
    assert not (tmp_path / "rows").exists() and (tmp_path / "table.md").read_text() == "table"
