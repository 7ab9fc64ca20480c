"""``train.init_from``: what of another run a new one starts from, and what does not fit."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from folders import as_label, colour_world, llm_folder, rewrite, run_settings

from mitrain.cli import main
from mitrain.core.errors import CheckpointError, ConfigError, ModelError
from mitrain.training import checkpoint, initial, runs, schema
from mitrain.training.build import resolved
from mitrain.training.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trained run of `classify`, and its export."""
    with colour_world(tmp_path_factory.mktemp("initial")) as path:
        rewrite(path / "data", as_label)
        config = configured(path, task={"name": "classify", "balance": True})
        Trainer(config, runs.create_or_find(config, path / "run"), quiet=True).fit()
        assert main(["export", str(path / "run"), "--out", str(path / "export"), "--json"]) == 0
        yield path


def configured(world: Path, **changes) -> schema.RunConfig:
    splits = {"train": "train.jsonl", "val": "val.jsonl"}
    data = {"name": "labelled", "root": str(world / "data"), "splits": splits}
    values = run_settings(world, **{"task": {"name": "classify"}, "data": data, **changes})
    values["train"] = {"steps": 2, "batch": 4, "lr": 0.1, "eval_every": 1, **changes.get("train", {})}
    return resolved(schema.from_dict(values))


def started(world: Path, folder: Path, source: Path, allow_changes: bool = False, **changes) -> Trainer:
    config = configured(world, train={"init_from": str(source)}, **changes)
    return Trainer(config, runs.create_or_find(config, folder), quiet=True, allow_changes=allow_changes)


def same(module: torch.nn.Module, saved: dict, but: tuple[str, ...] = ()) -> bool:
    return all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items() if name not in but)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
def test_a_run_starts_from_the_trained_adapter_and_head(world, tmp_path, kind, caplog):
    best = checkpoint.best(world / "run")
    source = {"run": world / "run", "checkpoint": best, "export": world / "export"}[kind]
    plain = configured(world, task={"name": "classify", "balance": True})
    fresh = Trainer(plain, tmp_path / "fresh", quiet=True)
    trainer = started(world, tmp_path / "new", source, task={"name": "classify", "balance": True})
    saved = checkpoint.load(best).tensors
    for name, module in trainer.model.trainable.items():
        assert same(module, saved[name])
    assert not same(fresh.model.adapter, saved["adapter"]) and not same(fresh.model.task, saved["head"])
    assert f"starting from the adapter and the task head of {source if kind == 'export' else best}" in caplog.text
    assert trainer.fit().step == 2


def test_of_other_data_the_weights_of_classes_are_its_own(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([lines[0], *lines]) + "\n")
    data = configured(world).to_dict()["data"] | {"root": str(tmp_path / "data")}
    task = {"name": "classify", "balance": True}
    trainer = started(world, tmp_path / "new", world / "run", data=data, task=task)
    saved = checkpoint.load(checkpoint.best(world / "run")).tensors["head"]
    assert same(trainer.model.task, saved, but=("weight",))
    assert not torch.equal(trainer.model.task.weight, saved["weight"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda rows: [row | {"label": f"very {row['label']}"} for row in rows], "its classes are other ones"),
        (lambda rows: [row | {"label": row["label"][:1] < "h"} for row in rows], "its classes are other ones"),
    ],
)
def test_a_head_of_other_classes_starts_anew(world, tmp_path, change, why, caplog):
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (world / "data" / f"{split}.jsonl").read_text().splitlines()]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named(change(rows), world)))
    data = {
        "name": "labelled",
        "root": str(tmp_path),
        "splits": {"train": "train.jsonl", "val": "val.jsonl"},
    }
    shutil.copytree(world / "data" / "images", tmp_path / "images")
    trainer = started(world, tmp_path / "new", world / "run", data=data)
    saved = checkpoint.load(checkpoint.best(world / "run")).tensors
    assert same(trainer.model.adapter, saved["adapter"])
    assert f"the task head starts anew: {why}" in caplog.text
    assert not torch.equal(trainer.model.task.head.bias, saved["head"]["head.bias"])


def named(rows: list[dict], world: Path) -> list[dict]:
    return [row | {"label": str(row["label"])} for row in rows]


def test_a_task_with_other_settings_starts_its_head_anew(world, tmp_path, caplog):
    started(world, tmp_path / "new", world / "run")
    assert "the task head starts anew: task.balance is true there, false here" in caplog.text


def test_the_head_of_an_earlier_version_comes_along_though_settings_have_come_since(world, tmp_path, caplog):
    start = initial.read(world / "run")
    task = {key: value for key, value in start.config["task"].items() if key not in ("loss", "metric")}
    config = configured(world, task={"name": "classify", "balance": True})
    trainer = Trainer(config, runs.create_or_find(config, tmp_path / "new"), quiet=True)
    initial.load_head(replace(start, config={**start.config, "task": task}), trainer.model)
    assert "and the task head of" in caplog.text and same(trainer.model.task, start.tensors["head"])


def test_other_settings_of_the_adapter_are_named(world, tmp_path, caplog):
    task = {"name": "classify", "balance": True}
    started(world, tmp_path / "new", world / "run", adapter={"name": "mit", "layers": [1], "gate": "sequence"}, task=task)
    assert "was trained with other settings: adapter.gate is" in caplog.text


def test_what_does_not_fit_is_refused(world, tmp_path):
    with pytest.raises(CheckpointError, match=r"the saved adapter in .* does not fit: .*infused\.0"):
        started(world, tmp_path / "layers", world / "run", adapter={"name": "mit", "layers": [0, 1]})
    with pytest.raises(ConfigError, match=r"train.init_from='.*absent' is no run folder"):
        started(world, tmp_path / "absent", world / "absent")
    runs.write_config(configured(world), (tmp_path / "empty").absolute())
    with pytest.raises(CheckpointError, match="has no complete checkpoint yet"):
        started(world, tmp_path / "new", tmp_path / "empty")


def test_an_adapter_of_other_frozen_models_is_refused_unless_allowed(world, tmp_path, caplog):
    llm_folder(tmp_path / "llm", seed=1)
    model = {"llm": str(tmp_path / "llm"), "encoders": {"image": {"name": str(world / "vision")}}}
    with pytest.raises(ModelError, match=r"the frozen models are not those .*text.weights"):
        started(world, tmp_path / "new", world / "run", model=model)
    caplog.set_level(logging.WARNING)
    started(world, tmp_path / "allowed", world / "run", allow_changes=True, model=model)
    assert "was trained on other frozen models: text.weights" in caplog.text


def test_a_resumed_run_does_not_start_again(world, tmp_path, capsys):
    source = shutil.copytree(world / "run", tmp_path / "source")
    values = configured(world, train={"init_from": str(source)}).to_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    for name, stopped in (("whole", False), ("resumed", True)):
        assert main(["train", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / name), "--json"]) == 0
        if stopped:
            shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000002")
            shutil.rmtree(source)
            assert main(["train", "--resume", str(tmp_path / name), "--json"]) == 0
    whole, resumed = (checkpoint.load(checkpoint.latest(tmp_path / name)) for name in ("whole", "resumed"))
    assert resumed.step == 2
    assert all(torch.equal(t, whole.tensors[g][n]) for g, named in resumed.tensors.items() for n, t in named.items())
