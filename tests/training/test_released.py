"""A run whose frozen states are cached holds no frozen weights that its steps do not read."""

import pytest
from folders import as_label, colour_world, rewrite, run_settings

from mitrain.compare import measures
from mitrain.inference.scoring import score_run
from mitrain.models import stream
from mitrain.models.layouts import layers_of
from mitrain.models.release import is_released
from mitrain.training import build, runs, schema
from mitrain.training.evaluate import evaluate
from mitrain.training.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("released")) as path:
        yield path


def trainer(world, task="answer", method="mit", **more):
    adapter = {"name": method} | ({"layers": [2]} if method == "mit" else {})
    train = {"steps": 3, "batch": 4, "check_largest": "off"}
    values = run_settings(world, **{"adapter": adapter, "task": {"name": task}, "train": train, **more})
    if task == "classify":
        splits = rewrite(world / "data", lambda row: as_label(row) | {"text": row["prompt"]}, "labelled-")
        values["data"] = {"name": "labelled", "root": str(world / "data"), "splits": splits}
    config = build.resolved(schema.from_dict(values))
    return Trainer(config, runs.create(config, world / "runs"), quiet=True)


def keep_all(monkeypatch):
    """From here on runs load everything and let go of nothing."""
    monkeypatch.setattr(build.Model, "release", lambda self: None)
    monkeypatch.setattr(build, "unread_of", lambda config: stream.nothing)


def gone(module):
    return {is_released(p) for p in module.parameters()} == {True}


def test_steps_run_without_what_the_cache_stands_for(world, monkeypatch):
    own = trainer(world)
    layers, model = layers_of(own.model.text.model), own.model
    assert [gone(layer) for layer in layers] == [True, True, False]
    assert not gone(model.text.model.get_output_embeddings())  # with which it speaks; the embeddings are tied to it, or
    tied = model.text.model.get_output_embeddings().weight is model.text.model.get_input_embeddings().weight
    assert gone(model.text.model.get_input_embeddings()) is not tied and gone(model.encoders["image"].model)
    losses = [own._step()[0].loss for _ in range(3)]
    assert [gone(layer) for layer in layers] == [True, True, False]
    keep_all(monkeypatch)
    other = trainer(world)
    assert not gone(layers_of(other.model.text.model)[0])
    assert losses == [other._step()[0].loss for _ in range(3)]
    saved = [measures.of_step(each)["bytes"]["weights"] for each in (own, other)]
    below = sum(p.nbytes for layer in layers_of(other.model.text.model)[:2] for p in layer.parameters())
    assert saved[1] - saved[0] >= below


def test_a_second_run_never_has_what_the_cache_stands_for(world, monkeypatch):
    trainer(world, "classify")
    seen = []
    monkeypatch.setattr(build.Model, "release", lambda self: seen.append(self.text.model))
    layers = layers_of(trainer(world, "classify").model.text.model)
    assert [gone(layer) for layer in layers] == [True, True, False]
    assert gone(seen[0].get_input_embeddings()) and gone(seen[0].get_output_embeddings())


def test_a_head_that_is_not_read_goes_too(world):
    own = trainer(world, "classify")
    model = own.model.text.model
    assert gone(model.get_output_embeddings()) and gone(model.get_input_embeddings())
    assert own._step()[0].applied and gone(model.get_output_embeddings())


def test_nothing_goes_where_a_step_reads_it(world, tmp_path):
    whole = trainer(world, cache=False).model
    assert not gone(layers_of(whole.text.model)[0]) and not gone(whole.encoders["image"].model)
    lora = trainer(world, method="lora").model  # changes every layer
    assert not any(is_released(p) for p in lora.text.model.parameters())


def test_what_speaks_after_training_speaks_as_a_run_that_kept_all(world, monkeypatch):
    own = trainer(world)
    own.fit()
    said = [p.values for p in evaluate(own.model, own.features, own.val, generate=True).predictions]
    assert not gone(layers_of(own.model.text.model)[0])  # it was read again
    keep_all(monkeypatch)
    other = trainer(world)
    other.fit()
    assert said == [p.values for p in evaluate(other.model, other.features, other.val, generate=True).predictions]
    assert score_run(own.folder, split="test")["accuracy"] == score_run(other.folder, split="test")["accuracy"]
