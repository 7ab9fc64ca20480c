"""A comparison without its runs: what is measured, kept, tried again; processes and their limit of time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from studies import BASE, NUMBERS, STUDY

from mitrain.cli import main
from mitrain.compare import compare, plots, processes, study
from mitrain.compare.compare import FAILED, OK, TOO_LONG
from mitrain.compare.search import Job

FIELDS = ("method", "task", "seed", "metric", "value", "trainable_parameters", "share", "peak_bytes", "saved_bytes",
          "step_ms", "flops_per_sample", "adapter_bytes", "controls", "status")  # fmt: skip
FIGURE = plots.figure


class Bench:
    """Stands in for the processes: counts what it is asked; fails, is too slow or is interrupted at a cell."""

    def __init__(self, fails=(), slow=(), stops=None, value=0.5):
        self.asked, self.fails, self.slow, self.stops, self.value = [], fails, slow, stops, value

    def __call__(self, cell, folder, limit_s):
        name = cell.id.name
        if name == self.stops:
            raise KeyboardInterrupt
        self.asked.append(name)
        (folder / "run").mkdir(exist_ok=True)
        if name in self.fails:
            return {"status": FAILED, "reason": "no room", "seconds": 1}
        if name in self.slow:
            return {"status": TOO_LONG, "reason": f"not finished after {limit_s:g} s", "seconds": round(limit_s)}
        if cell.panels:
            (folder / "predictions.png").write_text(f"{self.value} {name}")
        return {"status": OK, "seconds": 3, **NUMBERS, "value": self.value}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Asking git for every row and drawing would take longer than everything else; test_compare_drawn looks at figures."""
    monkeypatch.setattr("mitrain.core.provenance.commit", lambda: "abc1234")
    monkeypatch.setattr(plots, "figure", lambda *_: "<svg/>")


@pytest.fixture
def job(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return make(tmp_path)


def make(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "methods": {"mit": {}, "none": {"adapter": {"name": "none"}}}, **changes}))
    return Job(study.read(path), path, folder / "out")


def run(job, bench, **options):
    return compare.compare(job, "mitrain compare x", say=lambda _: None, measure=bench, **options)


def test_all_cells_are_measured_once_and_written(job):
    bench = Bench()
    found = run(job, bench)
    assert bench.asked == ["label-mit-seed0", "label-mit-seed1", "label-none-seed0", "label-none-seed1"]
    assert json.loads((job.out / "results.json").read_text()) == found
    assert all(name in row for row in found["rows"] for name in FIELDS)
    assert sheets(job) == {"label-mit.png": "0.5 label-mit-seed0", "label-none.png": "0.5 label-none-seed0"}
    for name in ("table.md", "label-parameters.svg", "label-memory.svg", "label-time.svg"):
        assert (job.out / name).read_text()
    assert not list((job.out / "cells").iterdir())
    again = Bench()
    assert run(job, again) == found and again.asked == []


def test_an_interruption_loses_no_row(job):
    with pytest.raises(KeyboardInterrupt):
        run(job, Bench(stops="label-none-seed0"))
    assert len(json.loads((job.out / "results.json").read_text())["rows"]) == 2
    second = Bench()
    assert len(run(job, second)["rows"]) == 4 and second.asked == ["label-none-seed0", "label-none-seed1"]


def test_failed_and_slow_cells_have_rows_and_the_rest_goes_on(job):
    found = run(job, Bench(fails=["label-mit-seed0"], slow=["label-none-seed0"]))
    assert [row["status"] for row in found["rows"]] == [FAILED, OK, TOO_LONG, OK]
    assert found["rows"][0]["reason"] == "no room" and found["rows"][0]["value"] is None
    assert "no room" in (job.out / "table.md").read_text()
    assert not (job.out / "cells/label-mit-seed0/run").exists() and (job.out / "cells/label-none-seed0/run").exists()
    with pytest.raises(compare.CompareError, match="1 of 4 cells failed: label-mit-seed0: no room; see table.md"):
        compare.check(found)
    second = Bench()
    run(job, second)
    assert second.asked == ["label-mit-seed0"], "failed cells are tried again, slow ones only with more time"
    third = Bench()
    run(job, third, limit_s=241)
    assert third.asked == ["label-none-seed0"]


def test_another_seed_joins_a_finished_table(job):
    run(job, Bench())
    fourth = Bench(value=0.9)
    found = run(job, fourth, seeds=[3])
    assert fourth.asked == ["label-mit-seed3", "label-none-seed3"]
    assert [(r["method"], r["seed"], r["value"]) for r in found["rows"]] == [
        ("mit", 0, 0.5), ("mit", 1, 0.5), ("mit", 3, 0.9), ("none", 0, 0.5), ("none", 1, 0.5), ("none", 3, 0.9),
    ]  # fmt: skip
    later = Bench()
    assert len(run(job, later)["rows"]) == 6 and later.asked == []


def sheets(job):
    return {path.name: path.read_text() for path in (job.out / "predictions").glob("*")}


def test_a_further_seed_has_its_sheet_where_the_results_came_without(job):
    run(job, Bench())
    run(job, Bench(value=0.9), seeds=[2])
    assert sheets(job)["label-mit.png"] == "0.5 label-mit-seed0"
    for path in (job.out / "predictions").glob("*"):
        path.unlink()
    run(job, Bench(), seeds=[3, 4], only=["mit"])
    assert sheets(job) == {"label-mit.png": "0.5 label-mit-seed3"}


def test_a_sheet_of_other_settings_goes_with_its_rows(job, tmp_path):
    run(job, Bench())
    changed = make(tmp_path, methods={"mit": {"adapter.rank": 2}, "none": {"adapter": {"name": "none"}}})
    run(changed, Bench(value=0.9), seeds=[1], only=["mit"])
    assert sheets(job) == {"label-mit.png": "0.9 label-mit-seed1", "label-none.png": "0.5 label-none-seed0"}


def test_without_matplotlib_there_is_a_table_and_a_line(job, monkeypatch):
    monkeypatch.setattr(plots, "figure", FIGURE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    compare.compare(job, "x", say=said.append, measure=Bench())
    assert said[-1].startswith("there are no figures: ") and said[-1].endswith("pip install 'mitrain[plots]'")
    assert (job.out / "table.md").exists() and not list(job.out.glob("*.svg"))


def test_only_what_is_named_is_measured_and_the_rest_stays(job):
    run(job, Bench(), only=["mit"])
    lacking = json.loads((job.out / "results.json").read_text())["missing"]
    assert lacking and all("none" in name and "seed" not in name for name in lacking)
    assert f"Not measured yet: {lacking[0]}" in (job.out / "table.md").read_text()
    second = Bench()
    found = run(job, second, only=["none"], seeds=[1])
    assert second.asked == ["label-none-seed1"] and len(found["rows"]) == 3


def test_changed_settings_are_measured_anew_and_what_left_the_study_goes(job, tmp_path):
    run(job, Bench())
    told = []
    changed = make(tmp_path, methods={"mit": {"adapter.rank": 2}})
    bench = Bench()
    found = compare.compare(changed, "x", say=told.append, measure=bench)
    assert bench.asked == ["label-mit-seed0", "label-mit-seed1"] and len(found["rows"]) == 2
    assert sum("no longer in the study" in line for line in told) == 4


def test_a_cell_that_a_study_beside_it_has_measured_is_taken_over(job, tmp_path):
    run(job, Bench(fails=["label-mit-seed1"], value=0.7))
    other = make(tmp_path, name="other", methods={"same": {}, "wide": {"adapter.rank": 32}}, reduced="small")
    bench = Bench()
    found = run(Job(other.study, other.path, tmp_path / "other"), bench)
    assert bench.asked == ["label-same-seed1", "label-wide-seed0", "label-wide-seed1"], "a failed row is no result"
    assert [(r["method"], r["value"], r["reduced"]) for r in found["rows"][:2]] == [
        ("same", 0.7, "small"),
        ("same", 0.5, "small"),
    ]
    far = Bench()
    run(Job(other.study, other.path, tmp_path / "deep" / "other"), far)
    assert len(far.asked) == 4


def test_kept_rows_are_marked_as_the_study_says_now(job, tmp_path):
    run(job, Bench())
    bench = Bench()
    found = run(make(tmp_path, reduced="few steps"), bench)
    assert bench.asked == [] and {row["reduced"] for row in found["rows"]} == {"few steps"}


def test_rows_of_other_versions_are_measured_anew(job, monkeypatch):
    run(job, Bench())
    monkeypatch.setattr("mitrain.compare.cells.measured_with", lambda: {"torch": "99"})
    bench = Bench()
    run(job, bench)
    assert len(bench.asked) == 4


def test_a_point_that_is_the_methods_own_value_is_not_measured_twice(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    axes = {"steps": {"keys": ["train.steps"], "values": [5, 9], "methods": ["mit"]}}
    job, bench = make(tmp_path, axes=axes, seeds=[0]), Bench()
    rows = run(job, bench)["rows"]
    assert bench.asked == ["label-mit-seed0", "label-mit-steps-9-seed0", "label-none-seed0"]
    assert [(row["axis"], row["at"]) for row in rows] == [(None, None), ("steps", 5), ("steps", 9), (None, None)]


def test_damaged_results_are_no_results(job):
    job.out.mkdir()
    for text in ("{torn", "[1]", '{"rows": 5}', '{"rows": [5, {}, {"task": "label"}]}'):
        (job.out / "results.json").write_text(text)
        bench = Bench()
        run(job, bench)
        assert len(bench.asked) == 4
        (job.out / "results.json").unlink()


def test_damaged_results_are_kept_beside_the_new_ones(job):
    job.out.mkdir()
    (job.out / "results.json").write_text("{torn")
    said = []
    compare.compare(job, "x", say=said.append, measure=Bench())
    assert (job.out / "results.json.damaged").read_text() == "{torn" and "is damaged" in said[0]


def test_kept_rows_tell_their_controls_by_the_names_of_now(job):
    run(job, Bench())
    path = job.out / "results.json"
    path.write_text(path.read_text().replace('"other-inputs"', '"no-image"'))
    bench = Bench()
    found = run(job, bench)
    assert not bench.asked and {tuple(row["controls"]) for row in found["rows"]} == {("other-inputs",)}


@pytest.mark.parametrize(
    "edit",
    [
        *(lambda row, name=name: row.pop(name) for name in ("made", "status", "identity", "metric", "limit_s")),
        *(lambda row, name=name: row.update({name: "x"}) for name in ("value", "controls", "made", "seconds")),
        lambda row: row["made"].pop("commit"),
        lambda row: row.update(task=["label"]),
    ],
)
def test_a_damaged_row_is_measured_again(job, edit):
    run(job, Bench())
    path = job.out / "results.json"
    values = json.loads(path.read_text())
    edit(values["rows"][1])
    path.write_text(json.dumps(values))
    bench = Bench()
    run(job, bench)
    assert bench.asked == ["label-mit-seed1"]


def test_the_list_estimates_from_rows(job):
    assert [(c["done"], c["seconds"], c["at_most"]) for c in compare.listed(job, [0], [])] == [(False, 240, True)] * 2
    run(job, Bench(), only=["mit"], seeds=[0])
    found = compare.listed(job, None, [])
    assert [(c["cell"], c["done"], c["seconds"], c["at_most"]) for c in found[:3]] == [
        ("label-mit-seed0", True, 3, False), ("label-mit-seed1", False, 3, False), ("label-none-seed0", False, 3, False),
    ]  # fmt: skip


def python(code, said, limit_s, grace_s=5.0):
    return processes.run([sys.executable, "-S", "-c", code], said, limit_s, grace_s)


def test_a_process_that_ends_gives_its_code_and_says_its_last_line(tmp_path):
    said = tmp_path / "said"
    assert python("print('one'); print('two '); print()", said, 60) == 0
    assert processes.last_line(said) == "two"
    assert python("raise SystemExit(7)", said, 60) == 7
    assert processes.last_line(tmp_path / "none") == "it said nothing"


def test_a_process_that_takes_too_long_is_asked_to_stop_and_then_killed(tmp_path):
    said = tmp_path / "said"
    polite = "import signal, sys, time; signal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(0))); "
    assert python(polite + "print('on', flush=True); time.sleep(600)", said, 2.0, 60) is None
    assert processes.last_line(said) in ("saved", "on", "it said nothing")
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    start = time.monotonic()
    assert python(stubborn, said, 0.5, 0.1) is None
    assert time.monotonic() - start < 300


def test_a_cell_goes_on_with_the_time_it_has_left(job, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(processes, "run", lambda command, said, limit_s, beat: given.append(limit_s))
    cell = compare.resolve(job.study, job.path, compare.cell_ids(job.study)[0])
    (tmp_path / "seconds").write_text("100.0\n")
    assert compare.in_process(cell, tmp_path, 240)["status"] == TOO_LONG
    assert given == [140.0] and float((tmp_path / "seconds").read_text()) >= 100


@pytest.mark.parametrize(
    ("code", "status", "reason"), [(1, FAILED, "no room"), (-signal.SIGKILL, FAILED, "killed by signal 9: no room")]
)
def test_how_a_process_ended_is_reported(job, monkeypatch, tmp_path, code, status, reason):
    cell = compare.resolve(job.study, job.path, compare.cell_ids(job.study)[0])
    (tmp_path / "said.txt").write_text("x\nmitrain: no room\n")
    monkeypatch.setattr(processes, "run", lambda *_, **__: code)
    found = compare.in_process(cell, tmp_path, 9)
    assert (found["status"], found["reason"]) == (status, reason)


@pytest.mark.parametrize("left", [None, "{torn", '{"identity": "another"}'])
def test_a_process_that_left_no_row_of_its_own_has_failed(job, monkeypatch, tmp_path, left):
    cell = compare.resolve(job.study, job.path, compare.cell_ids(job.study)[0])
    if left:
        (tmp_path / "row.json").write_text(left)
    monkeypatch.setattr(processes, "run", lambda *_, **__: 0)
    found = compare.in_process(cell, tmp_path, 9)
    assert (found["status"], found["reason"]) == (FAILED, "ended without its row: it said nothing")


def test_the_time_of_a_cell_is_kept_while_it_runs(tmp_path, monkeypatch):
    """Also where this process is killed, and so writes nothing at its end."""
    monkeypatch.setattr(processes, "BEAT_S", 0.05)
    clock, kept = processes.Clock(tmp_path / "seconds"), []

    def beat():
        clock.keep()
        kept.append(float((tmp_path / "seconds").read_text()))

    code = "import pathlib, time\nwhile not pathlib.Path('seconds').exists(): time.sleep(0.01)"
    monkeypatch.chdir(tmp_path)
    assert processes.run([sys.executable, "-S", "-c", code], tmp_path / "said", 60, beat=beat) == 0
    assert kept and kept == sorted(kept)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux to end a process with its parent")
def test_a_cell_ends_with_the_process_that_started_it_even_when_that_is_killed(tmp_path):
    """The parent starts the cell and is killed; the cell is asked to stop, and says so."""
    cell = (
        "import os, signal, sys, time; from mitrain.compare.processes import end_with;"
        "signal.signal(15, lambda *_: (open('stopped', 'w').close(), os._exit(0)));"
        "there = end_with(int(sys.argv[1])); open('ready', 'w').close(); time.sleep(600 if there else 0)"
    )
    parent = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {cell!r}, str(os.getpid())])"
    process = subprocess.Popen([sys.executable, "-S", "-c", parent], cwd=tmp_path, env=dict(os.environ))
    wait_for(tmp_path / "ready")
    process.kill()
    process.wait()
    wait_for(tmp_path / "stopped")


def test_a_parent_that_has_ended_already_is_reported():
    assert processes.end_with(os.getppid()) and not processes.end_with(-1)


def wait_for(path, seconds=300):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} was not written"
        time.sleep(0.02)


def test_a_process_that_was_stopped_interrupts(job, monkeypatch, tmp_path):
    cell = compare.resolve(job.study, job.path, compare.cell_ids(job.study)[0])
    monkeypatch.setattr(processes, "run", lambda *_, **__: compare.PREEMPTED)
    with pytest.raises(KeyboardInterrupt):
        compare.in_process(cell, tmp_path, 9)


def command(capsys, *words):
    code = main(["compare", *map(str, words)])
    return code, capsys.readouterr()


def test_the_command_prints_rows_and_fails_with_them(job, capsys, monkeypatch):
    monkeypatch.setattr(compare, "in_process", Bench(fails=["label-none-seed1"]))
    code, told = command(capsys, job.path, "--out", job.out, "--json")
    document = json.loads(told.out)
    assert code == 1 and len(document["rows"]) == 4 and "1 of 4 cells failed" in told.err
    assert document["made"]["command"] == f"mitrain compare {job.path} --out {job.out}"
    monkeypatch.setattr(compare, "in_process", Bench())
    code, told = command(capsys, job.path, "--out", job.out, "--seeds", "3", "--only", "mit")
    assert code == 1, "the cell that failed is still in the table"
    assert "| label | mit | accuracy | 0.500 ± 0.000 |" in told.out


def test_the_command_lists_without_measuring(job, capsys):
    code, told = command(capsys, job.path, "--list", "--out", job.out)
    assert code == 0 and "label-mit-seed0" in told.out and "4 cells, 0 finished" in told.out and not job.out.exists()


def test_a_shipped_study_goes_by_its_name_wherever_one_is(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    code, told = command(capsys, "studies/fusion", "--list")
    assert code == 0 and "classify-mit-seed0" in told.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "x"], "--seeds x are no seeds"),
        (["--seeds", "-1"], "are no seeds"),
        (["--limit", "0"], "leaves no time"),
        (["--only", "mut"], "names no cell"),
    ],
)
def test_bad_options_are_one_line(job, capsys, words, said):
    words = [f"{words[0]}={words[1]}"] if words[0] == "--seeds" else words
    code, told = command(capsys, job.path, *words)
    assert code == 2 and said in told.err and told.err.count("\n") == 1
    assert not job.out.exists()


def test_a_study_that_is_not_there_is_one_line(capsys, tmp_path):
    code, told = command(capsys, tmp_path / "none.yaml")
    assert code == 2 and told.err.count("\n") == 1 and "no configuration file" in told.err
