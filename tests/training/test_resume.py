"""What a resumed run must have in common with the one that was stopped, and that it then is the undisturbed one."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import signed
from folders import colour_image, colour_world, llm_folder, run_settings

from mitrain import methods
from mitrain.cli import main
from mitrain.methods.mit.mit import MiT
from mitrain.training import checkpoint, runs, schema
from mitrain.training.trainer import Trainer

STEPS, STOPPED = 4, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models and data, a whole run with noise on its features, and the same as it was stopped."""
    with colour_world(tmp_path_factory.mktemp("resume"), train=8, val=4) as path:
        features = {"views": 2, "noise": 0.1, "dropout": 0.2}
        train = {"steps": STEPS, "batch": 4, "save_every": STOPPED, "eval_every": STOPPED}
        config = schema.from_dict(run_settings(path, features=features, train=train))
        (path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
        whole = runs.create_or_find(config, path / "whole")
        Trainer(config, whole, quiet=True).fit()
        shutil.copytree(whole, path / "stopped")
        shutil.rmtree(path / "stopped" / "checkpoints" / f"step-{STEPS:08d}")
        (path / "stopped" / "summary.json").unlink()
        yield path


@pytest.fixture
def run(world, tmp_path):
    """The stopped run on data of its own, which may be changed."""
    data = shutil.copytree(world / "data", tmp_path / "data")
    run = shutil.copytree(world / "stopped", tmp_path / "run")
    edit(run, lambda values: values["data"].update(root=str(data)))
    path = run / "checkpoints" / f"step-{STOPPED:08d}"
    state = json.loads((path / "state.json").read_text())
    state["config"]["data"]["root"] = str(data)
    signed(path, "state.json", json.dumps(state).encode())
    return run


def edit(run: Path, change) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    change(values)
    (run / "config.yaml").write_text(yaml.safe_dump(values))


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(checkpoint.latest(run))
    assert saved.step == STEPS
    return saved.tensors["adapter"]


def other_answers(run: Path) -> None:
    path = run.parent / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["answer"] = next(answer for answer in rows[5]["candidates"] if answer != rows[5]["answer"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_picture(run: Path) -> None:
    row = json.loads((run.parent / "data" / "val.jsonl").read_text().splitlines()[0])
    colour_image("yellow", 77).save(run.parent / "data" / row["image"])


def other_base(run: Path) -> None:
    llm_folder(run.parent / "other", seed=1)
    edit(run, lambda values: values["model"].update(llm=str(run.parent / "other")))


CHANGES = [
    (lambda run: edit(run, lambda v: v["train"].update(lr=0.5)), ["train.lr is 0.001 there, 0.5 here"]),
    (lambda run: edit(run, lambda v: v.update(seed=7)), ["seed is 0 there, 7 here"]),
    (lambda run: edit(run, lambda v: v["train"].update(steps=6)), ["train.steps is 4 there, 6 here"]),
    (other_answers, ["data.train.answer differs"]),
    (other_picture, ["data.val.image.content differs"]),
    (other_base, ["base.text.weights differs", "model.llm is"]),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_whatever_changed_is_named_and_refused_and_nothing_is_lost(run, capsys, change, says):
    change(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run), "--json"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(text in line for text in says) and "--allow-changes" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_every_change_is_named_in_one_line(run, capsys):
    for change, _ in CHANGES[:5]:
        change(run)
    assert main(["train", "--resume", str(run), "--json"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(text in line for _, says in CHANGES[:5] for text in says)


def test_with_the_word_it_goes_on_and_says_what_changed(run, caplog, capsys):
    other_answers(run)
    with caplog.at_level(logging.WARNING):
        assert main(["train", "--resume", str(run), "train.steps=6", "--allow-changes", "--json"]) == 0
    (said,) = [record.message for record in caplog.records if "with changes" in record.message]
    assert "train.steps is 4 there, 6 here" in said and "data.train.answer differs" in said
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert runs.read_config(run).train.steps == 6
    assert main(["train", "--resume", str(run), "--json"]) == 0  # it is that run now


def test_a_change_on_the_command_line_needs_the_word(run, capsys):
    assert main(["train", "--resume", str(run), "train.steps=6", "--json"]) == 2
    assert "--allow-changes" in capsys.readouterr().err
    assert main(["train", "--run-dir", str(run), str(run / "config.yaml"), "train.steps=6", "--json"]) == 2
    assert "train.steps is 4 there, 6 here" in capsys.readouterr().err
    again = ["train", "--run-dir", str(run), str(run / "config.yaml"), "train.steps=6", "--allow-changes", "--json"]
    assert main(again) == 0 and json.loads(capsys.readouterr().out)["step"] == 6


def test_other_samples_with_the_word_begin_the_next_epoch(run):
    path = run.parent / "data" / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[:6]))
    assert main(["train", "--resume", str(run), "--json"]) == 2
    assert main(["train", "--resume", str(run), "--allow-changes", "--json"]) == 0
    cursor = checkpoint.load(checkpoint.latest(run)).state["loader"]
    assert cursor == {"epoch": 2, "position": 2, "samples": 6}


def test_a_moved_data_folder_is_the_same_data_once_its_place_is_allowed(run, world):
    moved = run.parent / "moved"
    (run.parent / "data").rename(moved)
    assert main(["train", "--resume", str(run), f"data.root={moved}", "--allow-changes", "--json"]) == 0
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(world / "whole").items())


def test_other_code_is_named_and_goes_on(run, caplog, monkeypatch):
    monkeypatch.setattr("mitrain.training.fingerprint.code", lambda: {"mitrain": "9.9"})
    with caplog.at_level(logging.WARNING):
        assert main(["train", "--resume", str(run), "--json"]) == 0
    assert "was written by other code: code.mitrain is" in caplog.text and "9.9 here" in caplog.text


# the generators


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(run, world):
    assert main(["train", "--resume", str(run), "--json"]) == 0
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(world / "whole").items())


class Drawing(MiT):
    """MiT with a regulariser that draws from each of the process's own generators, as a dropout in a model does."""

    def extra_loss(self):
        drawn = torch.rand(()) + random.random() + float(np.random.rand())
        return drawn * sum((p**2).sum() for p in self.parameters()), torch.tensor(1.0)


def test_the_generators_go_on_where_they_were(world, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "mit", Drawing)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["train", str(world / "config.yaml"), "--run-dir", str(whole), "--json"]) == 0
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / f"step-{STEPS:08d}")
    assert main(["train", "--resume", str(stopped), "--json"]) == 0
    assert all(torch.equal(tensor, weights(stopped)[name]) for name, tensor in weights(whole).items())


# the same answers wherever it is asked


def test_a_run_answers_alike_from_another_folder(world, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((world / "config.yaml").read_text())
    config["model"].update(llm="llm", encoders={"image": {"name": "./vision"}})
    config["data"]["root"] = "data"
    (world / "relative.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(world)
    assert main(["train", "relative.yaml", "train.steps=2", "--run-dir", "here", "--json"]) == 0
    picture = next((world / "data" / "images").glob("*.png"))
    ask = ["predict", str(world / "here"), "--image", str(picture), "--text", "the colour of this picture is", "--json"]
    answers = []
    for place in (world, tmp_path):
        monkeypatch.chdir(place)
        capsys.readouterr()
        assert main(ask) == 0
        answers.append(json.loads(capsys.readouterr().out))
        assert main(["eval", str(world / "here"), "--json"]) == 0
    assert answers[0] == answers[1] and len(answers[0]["probabilities"]) == 4
    monkeypatch.chdir(world)
    assert main(["train", "relative.yaml", "train.steps=2", "--run-dir", "here", "--json"]) == 0  # found again
