"""The training loop: what an adapter's regulariser does to a step, and what becomes of a model that diverges."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import colour_world, run_settings

from mitrain import methods
from mitrain.cli import main
from mitrain.core import config as sections
from mitrain.core.errors import UserError
from mitrain.inference.scoring import score_run
from mitrain.methods.mit.mit import MiT
from mitrain.tasks.answer import AnswerTask
from mitrain.training import build, checkpoint, runs, schema
from mitrain.training.evaluate import Evaluation
from mitrain.training.trainer import Trainer

LR = 0.5
TRAIN = {"steps": 1, "lr": LR, "optimizer": {"name": "sgd", "clip": None}, "schedule": {"name": "constant"}}


class Pulled(MiT):
    """MiT whose parameters are pulled to zero: the mean of the regulariser is ``strength`` · Σ p² / 2."""

    strength, count = 0.25, 3.0

    def extra_loss(self):
        squares = sum((p**2).sum() for p in self.parameters())
        return self.count * self.strength / 2 * squares, torch.tensor(self.count, dtype=torch.float64)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("trainer")) as path:
        yield path


def configured(world: Path, **train) -> schema.RunConfig:
    return schema.from_dict(run_settings(world, train=TRAIN | train))


def trained(world: Path, method: type[MiT], monkeypatch, **train) -> tuple[dict, dict]:
    """The adapter's tensors before and after training."""
    monkeypatch.setitem(methods.METHODS, "mit", method)
    config = configured(world, **train)
    trainer = Trainer(config, runs.create(config, world / "runs"), quiet=True)
    before = {name: p.detach().clone() for name, p in trainer.model.adapter.named_parameters()}
    trainer.fit()
    return before, checkpoint.load(checkpoint.latest(trainer.folder)).tensors["adapter"]


@pytest.mark.parametrize(("batch", "accumulate", "count"), [(12, 1, 3.0), (4, 3, 3.0), (3, 2, 1000.0), (12, 1, 0.5)])
def test_a_regulariser_weighs_the_same_whatever_the_batch(world, monkeypatch, batch, accumulate, count):
    monkeypatch.setattr(Pulled, "count", count)
    before, pulled = trained(world, Pulled, monkeypatch, batch=batch, accumulate=accumulate)
    _, plain = trained(world, MiT, monkeypatch, batch=batch, accumulate=accumulate)
    for name, start in before.items():
        torch.testing.assert_close(pulled[name] - plain[name], -LR * Pulled.strength * start, rtol=1e-4, atol=1e-5)
    assert any(start.abs().max() > 0.5 for start in before.values())


def test_a_regulariser_of_nothing_adds_nothing(world, monkeypatch):
    monkeypatch.setattr(Pulled, "extra_loss", lambda self: (torch.tensor(float("nan")), torch.tensor(0.0)))
    _, empty = trained(world, Pulled, monkeypatch, batch=6)
    _, plain = trained(world, MiT, monkeypatch, batch=6)
    assert all(torch.equal(empty[name], plain[name]) for name in plain)


def test_a_regularised_run_is_resumed_bit_for_bit(world, monkeypatch):
    options = {"steps": 4, "batch": 4, "accumulate": 2, "optimizer": {"name": "adamw"}, "save_every": 2}
    _, whole = trained(world, Pulled, monkeypatch, **options)
    fit, steps = Trainer.fit, []

    def stopped_after_two(self):
        step = self._step

        def counted():
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return step()

        self._step = counted
        with pytest.raises(KeyboardInterrupt):
            fit(self)
        assert checkpoint.load(checkpoint.latest(self.folder)).step == 2
        fit(Trainer(self.config, self.folder, quiet=True))

    monkeypatch.setattr(Trainer, "fit", stopped_after_two)
    _, resumed = trained(world, Pulled, monkeypatch, **options)
    assert len(steps) == 3 and all(torch.equal(resumed[name], whole[name]) for name in whole)


# a model that is no longer finite


DIVERGING = {"steps": 6, "batch": 4, "eval_every": 2, "save_every": 1, "keep": 2, "optimizer": {"name": "adamw"}}


@pytest.fixture(scope="module")
def undisturbed(world):
    config = configured(world, **DIVERGING)
    folder = runs.create(config, world / "runs")
    Trainer(config, folder, quiet=True).fit()
    return checkpoint.load(checkpoint.latest(folder)).tensors


def spoil_weight(trainer: Trainer) -> None:
    """One logit of a gate becomes infinite: the loss stays finite."""
    with torch.no_grad():
        dict(trainer.model.adapter.named_parameters())["infused.1.head_logit"].view(-1)[0] = torch.inf


def spoil_moment(trainer: Trainer) -> None:
    """A squared gradient beyond float32: the parameter would never move again."""
    param = dict(trainer.model.adapter.named_parameters())["infused.1.head_logit"]
    trainer.engine.optimizer.state[param]["exp_avg_sq"].view(-1)[0] = torch.inf


def spoilt_after(trainer: Trainer, step: int, spoil) -> Trainer:
    own = trainer._step

    def stepped():
        done = own()
        if trainer.engine.steps == step:
            spoil(trainer)
        return done

    trainer._step = stepped
    return trainer


@pytest.mark.parametrize(
    ("spoil", "step", "what"),
    [
        (spoil_weight, 3, "adapter.infused.1.head_logit"),
        (spoil_weight, 4, "adapter.infused.1.head_logit"),  # where val would be scored
        (spoil_moment, 3, "optimizer.exp_avg_sq.adapter.infused.1.head_logit"),
    ],
)
def test_a_model_that_diverges_fails_and_its_good_checkpoints_stay(world, undisturbed, spoil, step, what):
    config = configured(world, **DIVERGING)
    folder = runs.create(config, world / "runs")
    with pytest.raises(UserError) as caught:
        spoilt_after(Trainer(config, folder, quiet=True), step, spoil).fit()
    assert f"{what} (1 of 4 elements) is not finite at step {step}" in str(caught.value)
    assert f"the checkpoint of step {step - 1} is the last finite one" in str(caught.value)
    assert [path.name for path in sorted((folder / "checkpoints").glob("step-*"))][-2:] == [
        f"step-{step - 2:08d}",
        f"step-{step - 1:08d}",
    ]
    assert not (folder / "summary.json").exists()
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["kind"] == "val"] == [2]

    assert Trainer(config, folder, quiet=True).fit().step == 6
    resumed = checkpoint.load(checkpoint.latest(folder)).tensors
    for group, tensors in undisturbed.items():
        assert all(torch.equal(resumed[group][name], tensor) for name, tensor in tensors.items())


def test_a_rate_beyond_all_numbers_publishes_nothing(world):
    config = configured(world, **DIVERGING | {"save_every": 2, "lr": 3e38})
    folder = runs.create(config, world / "runs")
    with pytest.raises(UserError, match="not finite at step 2.*no checkpoint was written yet"):
        Trainer(config, folder, quiet=True).fit()
    assert not checkpoint.any_published(folder)


def test_a_run_that_applied_no_step_has_failed(world, monkeypatch):
    config = configured(world, steps=3, batch=4)
    trainer = Trainer(config, runs.create(config, world / "runs"), quiet=True)
    loss = trainer.loss
    trainer.loss = lambda batch: (loss(batch)[0] * torch.nan, loss(batch)[1])
    with pytest.raises(UserError, match=r"none of 3 steps was applied \(non-finite loss 3 times\): nothing was learned"):
        trainer.fit()
    assert not checkpoint.any_published(trainer.folder) and not (trainer.folder / "summary.json").exists()


@pytest.mark.parametrize("minimises", [False, True])
def test_best_is_replaced_by_what_is_better_alone(world, monkeypatch, minimises):
    scores = iter([0.5, 0.5, 0.25, 0.25, 0.75] if minimises else [0.5, 0.5, 0.75, 0.75, 0.25])
    monkeypatch.setattr(AnswerTask, "minimises", minimises)
    monkeypatch.setattr("mitrain.training.trainer.evaluate", lambda *_, **__: Evaluation({"accuracy": next(scores)}, []))
    config = configured(world, steps=5, batch=4, lr=1e-3, eval_every=1, save_every=1, keep=5)
    outcome = Trainer(config, runs.create(config, world / "runs"), quiet=True).fit()
    assert (outcome.best, outcome.best_step) == (0.25 if minimises else 0.75, 3)
    assert checkpoint.load(checkpoint.best(outcome.folder)).step == 3


@pytest.mark.parametrize("minimises", [False, True])
def test_a_run_resumed_before_its_first_score_takes_whatever_comes(world, monkeypatch, minimises):
    monkeypatch.setattr(AnswerTask, "minimises", minimises)
    monkeypatch.setattr("mitrain.training.trainer.evaluate", lambda *_, **__: 1 / 0)
    config = configured(world, steps=2, batch=4, lr=1e-3, eval_every=2, save_every=1)
    folder = runs.create(config, world / "runs")
    with pytest.raises(ZeroDivisionError):
        Trainer(config, folder, quiet=True).fit()
    monkeypatch.setattr("mitrain.training.trainer.evaluate", lambda *_, **__: Evaluation({"accuracy": 0.5}, []))
    outcome = Trainer(config, folder, quiet=True).fit()
    assert (outcome.best, outcome.best_step) == (0.5, 2) and checkpoint.best(folder) is not None


def test_an_answer_without_candidates_can_be_wrong(world, caplog):
    """Blind to the pictures, the model gives the four colours one answer: a quarter is right, whatever it is."""
    config = configured(world, batch=4, lr=1e-3)
    splits = {split: f"open-{split}.jsonl" for split in ("train", "val")}
    for split, name in splits.items():
        rows = map(json.loads, (world / "data" / f"{split}.jsonl").read_text().splitlines())
        rows = [{key: value for key, value in row.items() if key != "candidates"} for row in rows]
        (world / "data" / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = config.model_copy(update={"data": config.data.model_copy(update={"splits": splits})})
    outcome = Trainer(config, runs.create(config, world / "runs"), quiet=True).fit()
    assert "4 of 4 samples have no candidates to choose from: 4 are ranked" in caplog.text
    for control in ("none", "shuffle", "frozen"):
        found = score_run(outcome.folder, split="val", control=control)
        assert found["scored_by"] == {"training answers": 4} and found["samples"] == 4
        assert control != "frozen" or found["accuracy"] == 0.25
    assert outcome.best < 1


# a run folder that goes away


@pytest.mark.parametrize("again", [False, True])
def test_a_moved_run_folder_is_named_and_not_made_anew(world, undisturbed, tmp_path, again):
    config, moved = configured(world, **DIVERGING), tmp_path / "moved"
    folder = runs.create(config, world / "runs")

    def move(trainer: Trainer) -> None:
        folder.rename(moved)
        if again:
            folder.mkdir()

    with pytest.raises(UserError, match=f"at step 3 the run folder .* was moved to {moved}: go on with mitrain train"):
        spoilt_after(Trainer(config, folder, quiet=True), 3, move).fit()
    assert list(folder.rglob("*")) == [] and folder.exists() == again
    (moved / ".owner").unlink()  # its owner, this process, would have ended
    assert Trainer(config, moved, quiet=True).fit().step == 6
    resumed = checkpoint.load(checkpoint.latest(moved)).tensors["adapter"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed["adapter"].items())


def test_a_deleted_run_folder_is_named_and_not_made_anew(world):
    config = configured(world, **DIVERGING | {"save_every": 6})
    folder = runs.create(config, world / "runs")
    with pytest.raises(UserError, match="at step 1 the run folder .* was deleted or moved away"):
        spoilt_after(Trainer(config, folder, quiet=True), 1, lambda trainer: shutil.rmtree(folder)).fit()
    assert not folder.exists()


def test_the_last_line_counts_the_bad_samples(world, tmp_path, capsys):
    config = configured(world).to_dict()
    shutil.copytree(world / "data", tmp_path / "data")
    (tmp_path / "data" / "images" / "3.png").unlink()
    (tmp_path / "config.yaml").write_text(json.dumps(config | {"data": config["data"] | {"root": str(tmp_path / "data")}}))
    assert main(["train", str(tmp_path / "config.yaml"), "data.bad_share=0.2", "--run-dir", str(tmp_path / "run")]) == 0
    assert "at step 1 (1 bad samples skipped); next" in capsys.readouterr().out.splitlines()[-1]
    assert main(["train", str(tmp_path / "config.yaml"), "data.bad_share=0.05", "--run-dir", str(tmp_path / "no")]) == 2
    assert "1 of 12 samples cannot be used" in capsys.readouterr().err


def test_max_skipped_bounds_the_skipped_steps_of_a_run(world):
    config = configured(world, steps=4, max_skipped=1)
    trainer = Trainer(config, runs.create(config, world / "runs"), quiet=True)
    loss = trainer.loss
    trainer.loss = lambda batch: (loss(batch)[0] * torch.nan, loss(batch)[1])
    with pytest.raises(UserError, match="2 steps skipped in total at step 2, more than the 1 allowed"):
        trainer.fit()


def test_eval_views_says_how_many_variants_an_evaluation_averages(world):
    values = configured(world).to_dict()
    config = schema.from_dict({**values, "features": {"normalize": "none", "eval_views": 3}})
    trainer = Trainer(config, runs.create(config, world / "runs"), quiet=True)
    paths = sorted({sample.inputs["image"] for sample in trainer.val})
    inputs = [{"image": path} for path in paths]
    batch = trainer.model.evaluation_batch(trainer.val[: len(paths)], inputs, trainer.features)
    views = torch.stack([trainer.features.pooled(inputs, [view] * len(paths))[0] for view in range(3)])
    assert torch.equal(batch.inputs.feature, views.mean(0)) and not torch.equal(views[0], views.mean(0))


def test_source_seed_chooses_the_prepared_data_set(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(build.prepared, "ensure_data", lambda name, seed: asked.append((name, seed)) or tmp_path)
    given = {"name": "records", "source": "tuxpaint", "source_seed": 3}
    assert build.resolve_data(sections.choose("data", given)) == tmp_path and asked == [("tuxpaint", 3)]
