"""What `answer` says of one picture, of its data and beside its baselines; and which models and methods it takes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from answers import FEATURES, make, opened, samples
from modalities import pictures

from mitrain.core.errors import ConfigError, UserError
from mitrain.methods.base import Traits
from mitrain.tasks.answer import FREQUENT, AnswerConfig, AnswerTask
from mitrain.tasks.base import Batch, Question, Splits


def question(candidates=(), text="this thing is a", features=FEATURES[:1]):
    asked = []

    def see(sample):
        asked.append(sample)
        return Batch([sample], pictures(features))

    return Question(
        "9.png", {"image": "9.png"}, {"image": "shelf/9.png"}, text, candidates, see, lambda: None, "the run"
    ), asked


def test_a_picture_is_asked_about_with_the_users_candidates(folder):
    task, (put, asked) = make(folder), question(["red", "blue square"])
    found = task.ask(put)
    (sample,) = asked
    assert (sample.id, sample.inputs["image"], sample.prompt, sample.candidates) == (
        "9.png",
        "9.png",
        "this thing is a",
        ("red", "blue square"),
    )
    (one,) = task.predict(Batch([sample], pictures(FEATURES[:1])), generate=True)
    chances = one.values["probabilities"]
    likeliest = max(chances, key=chances.get)
    assert found.values == {
        "image": "shelf/9.png",
        "prompt": "this thing is a",
        "generated": one.values["generated"],
        "answer": likeliest,
        "probabilities": chances,
    }
    assert found.lines == [
        f"answer: {likeliest}",
        f"says: {one.values['generated']}",
        *(f"{chance:7.3f}  {name}" for name, chance in chances.items()),
    ]


def test_without_candidates_it_is_trainings_answers_or_what_is_said(folder):
    task, (put, _) = make(folder), question()
    said = task.ask(put)
    assert said.values["answer"] == said.values["generated"] and "probabilities" not in said.values
    assert said.lines == [f"answer: {said.values['answer']}", f"says: {said.values['generated']}"]
    task.remember(opened(["red", "yes"]))
    assert set(task.ask(put).values["probabilities"]) == {"red", "yes"}


@pytest.mark.parametrize("candidates", [["red"], ["red", "red"], ["r" * 99]])
def test_one_candidate_is_no_choice(folder, candidates):
    named = candidates[0][:60]
    with pytest.raises(ConfigError, match=f"^--candidates {named} leaves nothing to choose: give two or more, or none$"):
        make(folder).ask(question(candidates)[0])


def test_what_a_sample_with_one_candidate_is_scored_by(folder):
    task = make(folder)
    task.remember(opened(["red", "yes"]))
    asked = [replace(opened(["red"])[0], candidates=each) for each in (("red",), ("red", "yes"))]
    found = task.predict(Batch(asked, pictures(FEATURES[:2])))
    assert [each.values["scored_by"] for each in found] == ["training answers", "candidates"]


def test_an_answer_of_what_is_no_number_is_refused(folder):
    with pytest.raises(UserError, match="^the run: 1 of 1 samples are scored with numbers that are not finite"):
        make(folder).ask(question(["red", "yes"], features=torch.full((1, 6), torch.nan))[0])


def test_data_is_described_by_kinds_of_questions():
    asked = [*samples(), replace(samples()[0], id="3", answer="blue", object=""), *opened(["x", "x"])]
    assert AnswerTask.describe(asked) == {
        "objects": 1,
        "kinds": {
            "kind0": {"samples": 3, "different": 3, "majority": 0.3333, "answers": {"red": 1, "yes": 1, "blue": 1}},
            "kind1": {"samples": 1, "different": 1, "majority": 1.0, "answers": {"blue square": 1}},
            "answer": {"samples": 2, "different": 1, "majority": 1.0, "answers": {"x": 2}},
        },
    }
    many = AnswerTask.describe(opened([str(i) for i in range(FREQUENT + 1)]))["kinds"]["answer"]
    assert many["different"] == FREQUENT + 1 and len(many["answers"]) == FREQUENT


def test_baselines_are_the_best_constant_and_a_probe(folder):
    known = opened(["red", "yes"] * 8)
    told = {"red": 1.0, "yes": -1.0}
    splits = Splits(
        chosen=opened(["red", "red", "yes"]),
        learn=lambda: (known, known[:4]),
        complete=lambda: [],
        features=lambda some: torch.tensor([[told[s.answer], 0.5] for s in some]),
        seed=0,
    )
    found = make(folder).baselines(splits)
    assert found["majority answer"] == {"accuracy": 2 / 3, "samples": 3}
    assert set(found) == {"majority answer", "linear probe on the same features"}
    probe = found["linear probe on the same features"]
    assert (probe["accuracy"], probe["samples"]) == (1.0, 3)


def test_of_answers_that_training_never_gave_words_are_chosen_instead(folder):
    """Features are the words' own vectors, so that the ridge regression knows words that no probe has a class for."""
    task = make(folder)
    known, unseen = opened(["red", "yes", "blue", "no"] * 4), opened(["a", "b", "c"])
    unseen = [replace(s, candidates=("a", "b", "c")) for s in unseen]
    splits = Splits(
        chosen=unseen,
        learn=lambda: (known, unseen[:2]),
        complete=lambda: [],
        features=lambda some: torch.tensor(task.word_vectors([s.answer for s in some])),
        seed=0,
    )
    found = task.baselines(splits)
    assert found["linear probe on the same features"]["accuracy"] == 0
    assert found["ridge regression to the words offered"]["accuracy"] > 0.5


def test_of_several_kinds_of_questions_each_has_its_constant(folder):
    asked = opened(["red", "red", "blue", "yes", "no", "no", "no", "red"])
    asked = [replace(s, kind="colour" if s.answer in ("red", "blue") else "yesno") for s in asked]
    splits = Splits(
        chosen=asked,
        learn=lambda: (asked, []),
        complete=lambda: [],
        features=lambda some: torch.ones(len(some), 2),
        seed=0,
    )
    found = make(folder).baselines(splits)
    assert found["majority answer"] == {
        "accuracy": 3 / 8,
        "accuracy/colour": 0.75,
        "accuracy/yesno": 0.0,
        "samples": 8,
    }
    each = found["majority answer to each kind of question"]
    assert each == {"accuracy": 0.75, "accuracy/colour": 0.75, "accuracy/yesno": 0.75, "samples": 8}


def test_it_takes_what_goes_through_the_language_head(folder):
    parts, data = make(folder).parts, SimpleNamespace(texts=True)
    built = AnswerTask.build(AnswerConfig(max_new_tokens=3), SimpleNamespace(parts=parts, data=data))
    assert built.config.max_new_tokens == 3 and built.parts is parts
    silent = SimpleNamespace(speaks=False, model=torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="^model.llm is a Linear, which has no language head to answer with: take "):
        AnswerTask.build(AnswerConfig(), SimpleNamespace(parts=replace(parts, text=silent), data=data))
    others = [{"runs_layers": True}, {"wraps_text_model": True}, {"backbones": ("text", "encoder")}]
    for traits in others:
        adapter = SimpleNamespace(traits=Traits("other", **traits))
        with pytest.raises(ConfigError, match="^the method 'other' does not work through the language head: take "):
            AnswerTask.build(AnswerConfig(), SimpleNamespace(parts=replace(parts, adapter=adapter), data=data))
