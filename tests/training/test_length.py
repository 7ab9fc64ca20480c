"""How long a run is: steps or epochs, what follows from them, and its end when val no longer gets better."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from commands import as_json
from folders import colour_world, run_settings

from mitrain.cli import main
from mitrain.core.errors import ConfigError
from mitrain.training import checkpoint, runs, schema
from mitrain.training.evaluate import Evaluation
from mitrain.training.schedule import Span, span
from mitrain.training.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("length")) as path:
        (path / "config.yaml").write_text(yaml.safe_dump(configured(path, steps=2).to_dict()))
        yield path


def configured(world: Path, **train) -> schema.RunConfig:
    data = {"name": "records", "root": str(world / "data"), "bad_share": 0.5}
    train = {"batch": 5, "schedule": {"name": "cosine", "warmup": 0.4}, **train}
    return schema.from_dict(run_settings(world, data=data, train=train))


def fitted(config: schema.RunConfig, folder: Path) -> Trainer:
    trainer = Trainer(config, runs.create_or_find(config, folder), quiet=True)
    trainer.outcome = trainer.fit()
    return trainer


def logged(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(checkpoint.latest(folder)).tensors
    return {f"{group}.{name}": t for group, named in saved.items() for name, t in named.items()}


# epochs


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"), [(2, 12, 5, 5), (1, 10, 5, 2), (0.1, 1000, 10, 10), (0.5, 3, 8, 1)]
)
def test_epochs_are_the_fewest_steps_that_show_every_sample_so_often(epochs, samples, batch, steps):
    assert span(None, epochs, samples, batch).steps == steps


@pytest.mark.parametrize(
    ("every", "due"), [(3, [3, 6, 9]), (0.25, [2, 4, 6, 8, 10]), ("epoch", [3, 5, 8, 10]), (0.01, [*range(1, 11)])]
)
def test_what_is_done_every_so_often_is_due_at_these_steps(every, due):
    whole = Span(10, Fraction(12, 5))
    assert [step for step in range(1, 11) if whole.due(every, step)] == due


def test_a_run_in_epochs_is_the_run_of_as_many_steps(world, tmp_path):
    trainer = fitted(configured(world, epochs=2), tmp_path / "epochs")
    assert (trainer.outcome.step, trainer.outcome.ended) == (5, None)
    assert [line["step"] for line in logged(tmp_path / "epochs", "val")] == [3, 5]
    head, *rest = (tmp_path / "epochs" / "config.yaml").read_text().splitlines()
    assert head.endswith("; 2 epochs of 12 samples: 5 steps")
    assert runs.read_config(tmp_path / "epochs") == trainer.config and "  steps: null" in rest
    assert checkpoint.load(checkpoint.latest(tmp_path / "epochs")).state["steps"] == 5
    assert json.loads((tmp_path / "epochs" / "summary.json").read_text())["steps"] == 5
    fitted(configured(world, steps=5, eval_every="epoch", save_every="epoch"), tmp_path / "steps")
    for key in ("loss", "lr", "grad_norm"):
        one, other = ([line[key] for line in logged(tmp_path / name, "train")] for name in ("epochs", "steps"))
        assert one == other and len(one) == 5
    rates = [line["lr"] for line in logged(tmp_path / "epochs", "train")]
    assert rates[:3] == [5e-4, 1e-3, 1e-3] and rates[3] == pytest.approx(7.5e-4)  # 0.4 of 5 steps of warm-up, then cosine
    whole = tensors(tmp_path / "steps")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(tmp_path / "epochs").items())


def test_epochs_are_of_the_samples_that_can_be_read(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    for number in (3, 5, 7):
        (tmp_path / "data" / "images" / f"{number}.png").unlink()
    config = configured(world, epochs=1, batch=3)
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": str(tmp_path / "data")})})
    assert Trainer(config, tmp_path, quiet=True).span.steps == 3


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"steps": 3, "epochs": 2}, "give steps or epochs"),
        ({"steps": None}, "give steps or epochs"),
        ({"eval_every": 1.5}, "train.eval_every=1.5: give a whole number of steps, a share"),
        ({"eval_every": 1.0}, "1.0 may be each step or the whole run: give 1 for the one, the number of the run's steps"),
        ({"save_every": "epochs"}, "give a whole number of steps, a share of the run below 1, or epoch"),
        ({"eval_every": 0}, "give a whole number of steps"),
        ({"eval_every": True}, "true and false are no value"),
        ({"patience": 0}, "train.patience=0"),
    ],
)
def test_a_length_that_is_none_is_one_line(world, train, words):
    with pytest.raises(ConfigError, match=words) as caught:
        configured(world, **train)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "steps", "epochs"),
    [
        (["train.epochs=3"], None, 3),
        (["train.epochs=null"], 2, None),
        (["train.steps=null", "train.epochs=1"], None, 1),
        (["train.steps=7"], 7, None),
    ],
)
def test_what_the_command_line_gives_takes_the_place_of_the_file_s(world, words, steps, epochs):
    train = schema.load(world / "config.yaml", words).train
    assert (train.steps, train.epochs) == (steps, epochs)


def test_a_finished_run_is_extended_by_steps_or_epochs(world, tmp_path, capsys):
    run = tmp_path / "run"
    constant = [str(world / "config.yaml"), "train.schedule.name=constant", "train.schedule.warmup=2"]
    assert main(["train", *constant, "--run-dir", str(run), "--json"]) == 0
    assert main(["train", "--resume", str(run), "train.steps=4", "--json"]) == 2
    assert "--allow-changes" in capsys.readouterr().err.splitlines()[-1]
    for change, steps in (("train.steps=4", 4), ("train.epochs=2.5", 6)):
        assert as_json(capsys, "train", "--resume", run, change, "--allow-changes")["step"] == steps
        assert [line["step"] for line in logged(run, "train")] == [*range(1, steps + 1)]
        assert json.loads((run / "summary.json").read_text())["steps"] == steps
    assert runs.read_config(run).train.epochs == 2.5
    assert main(["train", *constant, "train.steps=6", "--run-dir", str(tmp_path / "straight"), "--json"]) == 0
    straight = tensors(tmp_path / "straight")
    assert all(torch.equal(tensor, straight[name]) for name, tensor in tensors(run).items())


@pytest.mark.parametrize(
    ("train", "words"),
    [("train.steps=7", "7 steps of 5 samples"), ("train.epochs=3", "3 epochs in steps of 5 samples")],
)
def test_a_count_without_data_says_how_long_a_run_is(world, train, words, capsys):
    assert main(["train", str(world / "config.yaml"), train, "data.root=/absent", "--dry-run"]) == 0
    assert words in capsys.readouterr().out


# early stopping


SCORES = [0.5, 0.25, 0.5, 0.75, 0.5, 0.75, 0.25, 1.0]  # by step; 0.75 again is not better
PATIENT = {"steps": 8, "eval_every": 1, "save_every": 1, "patience": 3, "keep": 8}


@pytest.fixture
def scored(monkeypatch):
    def evaluate(model, *_, what: str, **__):
        return Evaluation({"accuracy": SCORES[int(what.rpartition(" ")[2]) - 1]}, [])

    monkeypatch.setattr("mitrain.training.trainer.evaluate", evaluate)


def test_a_run_whose_val_no_longer_gets_better_ends_and_says_why(world, tmp_path, scored):
    outcome = fitted(configured(world, **PATIENT), tmp_path / "run").outcome
    assert (outcome.step, outcome.best, outcome.best_step, outcome.stopped) == (7, 0.75, 4, None)
    assert outcome.ended == "3 evaluations without a better val (train.patience=3)"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"] == outcome.ended
    assert checkpoint.load(checkpoint.latest(tmp_path / "run")).step == 7
    assert checkpoint.load(checkpoint.best(tmp_path / "run")).step == 4
    again = fitted(configured(world, **PATIENT), tmp_path / "run").outcome
    assert (again.step, again.ended) == (7, outcome.ended), "a run that has ended does not go on"


@pytest.mark.parametrize("killed", [4, 5, 6])
def test_the_count_and_the_best_survive_a_kill(world, tmp_path, scored, killed):
    config = configured(world, **PATIENT)
    fitted(config, tmp_path / "whole")
    trainer = Trainer(config, runs.create_or_find(config, tmp_path / "killed"), quiet=True)
    own = trainer._step

    def stepped():
        if trainer.engine.steps == killed:
            raise KeyboardInterrupt
        return own()

    trainer._step = stepped
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    outcome = fitted(config, tmp_path / "killed").outcome
    assert (outcome.step, outcome.best, outcome.best_step) == (7, 0.75, 4)
    whole = tensors(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(tmp_path / "killed").items())


def test_the_command_says_why_a_run_ended(world, tmp_path, scored, capsys):
    given = [f"train.{key}={value}" for key, value in PATIENT.items()]
    assert main(["train", str(world / "config.yaml"), *given, "--run-dir", str(tmp_path / "run")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("ended after step 7: 3 evaluations without a better val (train.patience=3); best val 0.7500")
