"""Run folders that are made or found, as job scripts need them."""

import errno

import pytest

from mitrain.cli import main
from mitrain.core.errors import UserError
from mitrain.inference import report
from mitrain.training import runs, schema


def configured(**train):
    return schema.from_dict(
        {
            "model": {"llm": "smollm2-135m-instruct", "encoders": {"image": {"name": "dinov2-vits14"}}},
            "adapter": {"name": "mit"},
            "task": {"name": "answer"},
            "data": {"name": "records", "source": "digits"},
            "train": train,
        }
    )


def test_a_run_folder_is_made_and_then_found(tmp_path):
    folder = tmp_path / "runs" / "mine"
    assert runs.create_or_find(configured(steps=5), folder) == folder
    text = (folder / "config.yaml").read_text()
    assert runs.read_config(folder) == configured(steps=5)
    (folder / "metrics.jsonl").write_text("{}\n")
    assert runs.create_or_find(configured(steps=5), folder) == folder
    assert (folder / "config.yaml").read_text() == text and (folder / "metrics.jsonl").exists()


def test_a_folder_whose_making_was_interrupted_is_finished(tmp_path):
    (tmp_path / ".config.yaml.half").write_text("na")
    runs.create_or_find(configured(), tmp_path)
    assert runs.read_config(tmp_path) == configured()


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (
            lambda folder: runs.create_or_find(configured(steps=7), folder),
            r"train.steps is 7 there, 5 here\): give another",
        ),
        (lambda folder: (folder / "notes.txt").write_text("mine"), "is no run folder and holds 'notes.txt'"),
        (lambda folder: (folder / "config.yaml").write_text("name: ["), "config.yaml"),
        (lambda folder: (folder.rmdir(), folder.write_text("")), "cannot make the run folder"),
    ],
)
def test_what_is_another_run_or_none_is_refused_and_left_as_it_was(tmp_path, before, says):
    folder = tmp_path / "mine"
    folder.mkdir()
    before(folder)
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=says):
        runs.create_or_find(configured(steps=5), folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == there


@pytest.mark.parametrize("place", ["--runs", "--run-dir"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_refused_run_leaves_no_folder_unless_it_had_begun(tmp_path, monkeypatch, capsys, place, begun):
    def refuse(config, folder, **_):
        if begun:
            (folder / "metrics.jsonl").write_text("{}\n")
        raise UserError("not with this model")

    monkeypatch.setattr("mitrain.training.trainer.Trainer", refuse)
    runs.write_config(configured(), tmp_path)
    assert main(["train", str(tmp_path / "config.yaml"), place, str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err.endswith("mitrain: not with this model\n")
    assert [path.name for path in (tmp_path / "made").rglob("*.jsonl")] == ["metrics.jsonl"] * begun
    assert len(list(tmp_path.rglob("config.yaml"))) == 1 + begun


def test_a_resumed_run_stays_whatever_refuses_it(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("not on this machine")

    monkeypatch.setattr("mitrain.training.trainer.Trainer", refuse)
    runs.write_config(configured(), tmp_path)
    assert main(["train", "--resume", str(tmp_path)]) == 2 and (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("make", [runs.create, runs.create_or_find])
def test_a_disk_that_is_full_at_the_start_leaves_no_folder(tmp_path, monkeypatch, make):
    def full(path, _content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "write_atomic", full)
    with pytest.raises(UserError, match=rf"run folder {tmp_path}/.*No space left on device\): make room there or give"):
        make(configured(), tmp_path / "runs")
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name != "runs"] == []


@pytest.mark.parametrize("there", [False, True])
def test_a_report_on_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, there):
    """It names the folder; one that was there before stays, with what it held."""

    def full(path, content):
        if path.name == "table.md":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)

    monkeypatch.setattr(report, "write_atomic", full)
    out = tmp_path / "report"
    if there:
        out.mkdir()
        (out / "notes").write_text("mine")
    with pytest.raises(UserError, match=rf"report to '{out}' \(No space left on device\): make room there or give"):
        report.write(out, {"results.json": "{}", "table.md": "x"})
    assert out.exists() == there and (not there or (out / "notes").read_text() == "mine")
