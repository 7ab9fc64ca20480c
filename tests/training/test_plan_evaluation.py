"""What a plan says of scoring val, beside what tensors with storage hold."""

import pytest
from exported import make_config, make_world

from mitrain.core.config import override
from mitrain.models.release import released_in
from mitrain.tasks.generation import generated
from mitrain.training import schema
from mitrain.training.plan import PlanRequest, machine_of, plan
from mitrain.training.plan.evaluation import generating, scoring
from mitrain.training.plan.plan import empty_model, measured, unread
from mitrain.training.plan.tracing import passed, size_of
from mitrain.training.trainer import Trainer

ASKED = PlanRequest(machine_of("h100-80g"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = make_world(tmp_path_factory.mktemp("scored"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MITRAIN_CACHE", str(path / "cache"))
        yield path


def both(config):
    """The model without storage and its mode, a trainer, and val's samples in one batch."""
    trainer = Trainer(config, None, quiet=True)
    model, mode = empty_model(config)
    model.text.tokenizer = trainer.model.text.tokenizer
    model.task.remember(trainer.train)
    return model, mode, trainer, trainer.val


def batch_of(trainer, samples):
    return trainer.model.evaluation_batch(samples, [s.inputs for s in samples], trainer.features)


def changed(config, *changes):
    return schema.from_dict(override(config.to_dict(), changes))


@pytest.mark.parametrize("begins", [True, False])
def test_ranking_candidates_is_counted(world, monkeypatch, begins):
    model, mode, trainer, val = both(make_config(world))
    real = trainer.model
    real.train(False)
    batch = batch_of(trainer, val)
    real.task.begins = begins
    real.task.predict(batch)  # what was let go of is there again
    monkeypatch.setattr(type(real.task), "could_begin", begins)
    held = passed(real, lambda _: real.task.predict(batch))
    # Places and masks, which a plan does not count, are much beside the keys of 32 channels.
    assert scoring(model, val, mode) == pytest.approx(held, rel=0.1 if begins else 0.05)


@pytest.mark.parametrize(("tokens", "beams"), [(48, 1), (3, 1), (12, 3)])
def test_what_generating_holds_is_counted(world, tokens, beams):
    """The texts at their full length, whose keys and values are most of it, or reading the prompts."""
    config = changed(make_config(world), f"task.max_new_tokens={tokens}", f"task.beams={beams}")
    model, mode, trainer, val = both(config)
    real, batch = trainer.model, batch_of(trainer, val)
    real.train(False)
    ids, mask = real.text.pad([real.task.prompt_ids(s.prompt) for s in val], side="left")

    def say(_):
        with real.adapter.conditioned(batch.inputs, copies=beams):
            generated(real.task.parts, ids, mask, min_new_tokens=tokens, **real.task.config.options())

    say(None)  # what was let go of is there again
    # Ids and masks, which a plan does not count, are an eighth of what a model of 32 channels holds for a token.
    assert generating(model, val, mode) == pytest.approx(passed(real, say), rel=0.2)


def spoken(world):
    """A configuration whose samples have no candidates to rank."""
    for split in ("train", "val"):
        lines = (world / "data" / f"{split}.jsonl").read_text().replace('"candidates"', '"others"')
        (world / "data" / f"said-{split}.jsonl").write_text(lines.replace("the colour", "what", 1))
    found = make_config(world)
    data = found.data.model_copy(update={"splits": {s: f"said-{s}.jsonl" for s in ("train", "val")}})
    task = found.task.model_copy(update={"max_new_tokens": 16})
    return found.model_copy(update={"data": data, "task": task})


def test_what_speaks_holds_all_its_weights(world):
    """Of a run whose val has no candidates the steps hold the upper layers, and what generates the whole model."""
    assert "generation" not in plan(make_config(world), ASKED).moments
    found = measured(config := spoken(world), ASKED)
    said, gone = plan(config, ASKED, found=found), unread(config, found.model)
    beside = {name: said.moments[name] - found.held[name] for name in ("evaluation", "generation")}
    lower = sum(size_of(p) for p in found.model.text.model.parameters() if id(p) in gone)
    assert beside["generation"] - beside["evaluation"] == lower > 0
    assert said.total_bytes == max(said.moments.values())


def test_the_weights_that_speaking_took_back_are_gone_in_the_next_step(world, tmp_path):
    trainer = Trainer(changed(spoken(world), "train.steps=1", "train.schedule.warmup=0"), tmp_path, quiet=True)
    before = len(released_in(trainer.model.text.model))
    trainer.fit()
    assert before == len(released_in(trainer.model.text.model)) > 0
