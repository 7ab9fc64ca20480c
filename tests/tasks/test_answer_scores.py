"""What the answer task chooses from, says, counts and reports, by hand."""

from dataclasses import replace

import pytest
import torch
from answers import FEATURES, make, opened, samples
from modalities import pictures
from PIL import Image

from mitrain.core.errors import ModelError
from mitrain.data.figures import Panel
from mitrain.data.formats.records import AnswerSample
from mitrain.tasks import answer as module
from mitrain.tasks import language
from mitrain.tasks.answer import AnswerTask, answers_by_prompt, plain
from mitrain.tasks.base import Batch, Prediction, Splits
from mitrain.tasks.language import Numbers


def test_texts_to_prepare_are_each_prompt_with_its_answer_and_what_may_be_chosen(folder):
    task = make(folder)
    task.remember(opened(["red", "green"]))
    asked = [*samples()[2:], *opened(["blue"]), *opened(["blue"])]
    own = {("is this red", "yes"), ("this thing is a", "blue")}
    more = {("is this red", "no"), ("this thing is a", "red"), ("this thing is a", "green")}
    assert task.texts(asked, False) == [task.row(*pair) for pair in sorted(own)]
    assert task.texts(asked, True) == [task.row(*pair) for pair in sorted(own | more)]
    assert task.tokens(asked) == sum(len(task.row(s.prompt, s.answer)) for s in asked) > 0


@pytest.mark.parametrize(("count", "chooses"), [(1, False), (2, True), (100, True), (101, False)])
def test_of_how_many_training_answers_one_is_chosen(folder, count, chooses):
    task, (asked,) = make(folder), opened(["red"])
    task.remember(opened([f"thing {i}" for i in range(count)]))
    assert task.offered(asked) == (tuple(sorted(f"thing {i}" for i in range(count))) if chooses else ())
    assert task.must_generate([asked]) is not chooses
    assert task.offered(replace(asked, candidates=("b", "a", "b"))) == ("b", "a")
    assert task.offered(replace(asked, prompt="another")) == ()


def test_answers_of_training_are_those_it_gave_and_could_have_given():
    rows = [replace(opened(["b"])[0], candidates=("d", "c")), *opened(["a"]), *opened(["z"], "q")]
    assert answers_by_prompt(rows) == {"this thing is a": ("a", "b", "c", "d"), "q": ("z",)}


def test_many_candidates_are_scored_in_parts(folder, monkeypatch):
    task, sizes = make(folder), []
    expected = [p.values["probabilities"] for p in task.predict(Batch(samples(), pictures(FEATURES)))]
    whole = task.log_likelihood
    monkeypatch.setattr(module, "SCORE_ROWS", 4)
    monkeypatch.setattr(task, "log_likelihood", lambda pairs, *more: sizes.append(len(pairs)) or whole(pairs, *more))
    found = task.predict(Batch(samples(), pictures(FEATURES)))
    count = sum(len(s.candidates) for s in samples())
    assert sizes == [min(4, count - start) for start in range(0, count, 4)] and len(sizes) > 1
    assert [p.values["probabilities"] for p in found] == [pytest.approx(e, abs=2e-6) for e in expected]


def test_a_rank_without_candidates_keeps_the_others_company(folder, monkeypatch):
    """It runs its first sample again, so often as others have rounds, and scores nothing by that."""
    task, seen, alone = make(folder), [], opened(["red", "blue", "yes"])
    whole = task.log_likelihood
    monkeypatch.setattr(
        task,
        "log_likelihood",
        lambda pairs, features, *more: seen.append((pairs, features)) or whole(pairs, features, *more),
    )
    monkeypatch.setattr(module.dist, "gather", lambda rounds: [rounds, 2])
    assert [len(scores) for scores in task.candidate_scores(Batch(alone, pictures(FEATURES)))] == [0, 0, 0]
    assert [pairs for pairs, _ in seen] == [[("this thing is a", "red")]] * 2
    assert all(torch.equal(inputs.feature, FEATURES[:1]) for _, inputs in seen)
    seen.clear()
    assert [len(scores) for scores in task.candidate_scores(Batch(samples(), pictures(FEATURES)))] == [
        len(s.candidates) for s in samples()
    ]
    assert len(seen) == 2 and task.candidate_scores(Batch(alone, None))[0].dtype == torch.float64


def test_scores_are_summed_in_float64_and_without_a_picture_too(folder):
    task = make(folder)
    task.begins = False
    with torch.no_grad():
        parts = task.log_likelihood([("is this red", "yes"), ("is this red", "no")], None)
    blind = task.candidate_scores(Batch(samples()[2:], None))[0]
    assert blind.tolist() == [part.double().sum().item() for part in parts] and blind.dtype == torch.float64
    total, count = task.loss(Batch(samples(), pictures(FEATURES)))
    assert count.dtype == torch.float64 and total.requires_grad and not blind.requires_grad


@pytest.mark.parametrize("begins", [True, False])
def test_without_a_picture_what_was_asked_before_is_not_scored_again(folder, begins, monkeypatch):
    task, seen = make(folder), []
    task.begins = begins
    alone = [scores for sample in samples() for scores in task.candidate_scores(Batch([sample], None))]
    whole = task.log_likelihood
    monkeypatch.setattr(task, "log_likelihood", lambda pairs, *more: seen.extend(pairs) or whole(pairs, *more))
    found = task.candidate_scores(Batch([*samples(), *samples()], None))
    assert sorted(seen) == sorted({(s.prompt, c) for s in samples() for c in s.candidates})
    assert [scores.tolist() for scores in found] == [pytest.approx(scores.tolist(), abs=2e-6) for scores in [*alone, *alone]]
    seen.clear()
    task.candidate_scores(Batch([*samples(), *samples()], pictures(torch.cat([FEATURES, FEATURES.flip(0)]))))
    assert len(seen) == 2 * sum(len(s.candidates) for s in samples())


def test_a_prediction_says_what_it_is_of(folder):
    sample = AnswerSample("7", {"image": "7.png"}, "is this red", "no", ("yes", "no", "perhaps"), "kind", "thing")
    task, score = make(folder), torch.tensor([0.25, 1.5, -1.0], dtype=torch.float64)
    found = task._prediction(sample, score, "No!")
    chances = {n: round(v, 6) for n, v in zip(sample.candidates, score.softmax(0).tolist(), strict=True)}
    assert (found.id, found.inputs["image"], found.finite) == ("7", "7.png", True)
    assert found.values == {
        "prompt": "is this red",
        "answer": "no",
        "kind": "kind",
        "predicted": "no",
        "correct": True,
        "reciprocal_rank": 1.0,
        "probabilities": chances,
        "scored_by": "candidates",
        "generated": "No!",
        "exact_match": True,
    }
    assert list(found.values["probabilities"]) == ["no", "yes", "perhaps"]
    assert task._prediction(sample, score, "yes").values["exact_match"] is False
    assert "generated" not in task._prediction(sample, score, None).values
    assert not task._prediction(sample, score, "no", numbers=False).finite
    assert not task._prediction(sample, score.index_fill(0, torch.tensor([2]), -torch.inf), None).finite
    blank = Image.new("RGB", (4, 4))
    shown = task.panel(sample, found, blank)
    assert shown.lines == [f"no ({chances['no']:.2f})", "truth: no [thing]", "is this red"] and shown.right is True
    spoken = task._prediction(replace(sample, candidates=()), torch.zeros(0), "yes")
    assert spoken.values["scored_by"] == "generation" and spoken.finite
    assert task.panel(sample, spoken, blank) == Panel(blank, ["yes", "truth: no [thing]", "is this red"], False)


def test_the_reciprocal_rank_is_that_of_the_truth_among_the_candidates(folder):
    """no > yes > perhaps; of equal ones the truth is last, and what is not offered has none: 1/3 · (1/2 + 1/3 + 0)."""
    task = make(folder)
    samples = [replace(opened([a])[0], answer=a, candidates=("yes", "no", "perhaps")) for a in ("yes", "no", "red")]
    scores = [torch.tensor(x, dtype=torch.float64) for x in ([0.25, 1.5, -1.0], [0.5, 0.5, 0.5], [0.25, 1.5, -1.0])]
    predictions = [task._prediction(s, score, None) for s, score in zip(samples, scores, strict=True)]
    assert [p.values["reciprocal_rank"] for p in predictions] == [1 / 2, 1 / 3, 0]
    assert task.score(samples, predictions)["mrr"] == pytest.approx(5 / 18)
    assert task.each(predictions, "mrr") == [1 / 2, 1 / 3, 0]


def scored(task, *rows):
    """The metrics of (kind, answer, correct, exact match or None, how scored)."""
    asked = [replace(opened([answer])[0], kind=kind) for kind, answer, *_ in rows]
    predictions = [
        Prediction(
            s.id,
            s.inputs["image"],
            {"kind": s.kind, "correct": correct, "scored_by": how} | ({} if exact is None else {"exact_match": exact}),
        )
        for s, (_, _, correct, exact, how) in zip(asked, rows, strict=True)
    ]
    return task.score(asked, predictions)


def test_metrics_of_four_predictions_by_hand(folder):
    task, chosen = make(folder), "candidates"
    rows = [
        ("b", "x", True, True, chosen),
        ("a", "x", False, None, chosen),
        ("a", "y", True, False, "generation"),
        ("a", "x", False, False, chosen),
    ]
    found = scored(task, *rows)
    assert found == {
        "accuracy": 0.5,
        "samples": 4,
        "majority": 0.75,
        "accuracy/a": pytest.approx(1 / 3),
        "accuracy/b": 1.0,
        "scored_by": {chosen: 3, "generation": 1},
    }
    assert list(found)[3:5] == ["accuracy/a", "accuracy/b"]
    assert scored(task, *rows[:1]) == {"accuracy": 1.0, "samples": 1, "majority": 1.0, "exact_match": 1.0}
    assert scored(task, *rows[2:]) == {
        "accuracy": 0.5,
        "samples": 2,
        "majority": 0.5,
        "exact_match": 0.0,
        "scored_by": {"generation": 1, chosen: 1},
    }


def test_logits_that_are_no_numbers_are_noted_for_each_sample_and_beam():
    seen, logits = Numbers(3), torch.zeros(6, 5)
    logits[0, 1] = -torch.inf
    assert seen(None, logits) is logits and seen.all == [True, True, True]
    broken = logits.clone()
    broken[3, 4] = torch.nan  # the second beam of the second sample
    assert seen(None, broken) is broken and seen.all == [True, False, True]
    seen(None, logits)
    assert seen.all == [True, False, True]  # once is enough


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("  A  b\tc ", "a b c"),
        ("Stra\u00dfe", "strasse"),
        ("\uff21\u00b2", "a2"),
        (".,;:!?\"'` yes .,;:!?\"'`", "yes"),
        ("it's 3.5", "it's 3.5"),
        ("(a)", "(a)"),
        ("?!", "?!"),
        (" ", ""),
    ],
)  # fmt: skip
def test_what_of_an_answer_is_compared(answer, found):
    assert plain(answer) == found


def test_a_run_that_needs_no_words_starts_on_a_model_that_has_none(folder, monkeypatch, caplog):
    task = make(folder)

    def refuse(parts):
        assert parts is task.parts
        raise ModelError("it is mute")

    monkeypatch.setattr(language, "decoding", refuse)
    with pytest.raises(ModelError, match="it is mute"):
        task.rehearse([*samples(), *opened(["red"])])
    assert caplog.messages == []
    task.rehearse(samples())
    assert caplog.messages == ["this run will not be able to generate (predict, eval --generate): it is mute"]
    made = make(folder)
    monkeypatch.setattr(language, "decoding", lambda parts: {"use_cache": False})
    made.rehearse(samples())
    assert made.decoding == {"use_cache": False}


@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_said_is_asked_for_with_the_settings_of_the_task(folder, beams, monkeypatch):
    task, asked = make(folder, max_new_tokens=3, beams=beams), {}
    whole = language.generated
    monkeypatch.setattr(language, "decoding", lambda parts: {"use_cache": False})
    monkeypatch.setattr(language, "generated", lambda *a, **options: asked.update(options) or whole(*a, **options))
    said = task.generate(Batch(samples(), pictures(FEATURES)))
    assert asked.pop("logits_processor")[0].all == [True] * 3
    assert asked == {"max_new_tokens": 3, "num_beams": beams, "use_cache": False} | (
        {"length_penalty": 1.0} if beams > 1 else {}
    )
    assert len(said) == 3 and all(words == words.strip() for words in said)
    alone = [task.generate(Batch([s], pictures(FEATURES[i : i + 1])))[0] for i, s in enumerate(samples())]
    assert said == alone


def test_words_are_generated_where_they_are_asked_for_or_needed(folder):
    task = make(folder)
    for generate, asked, spoken in (
        (False, samples(), False),
        (True, samples(), True),
        (False, opened(["red"] * 3), True),
    ):
        found = task.predict(Batch(asked, pictures(FEATURES)), generate)
        assert [p.values.get("generated") for p in found] == (
            task.generate(Batch(asked, pictures(FEATURES))) if spoken else [None] * 3
        )


def test_a_prompt_stands_in_its_template(folder):
    task = make(folder, template="is {prompt} red")
    plain_task = make(folder)
    assert task.row("this thing", "yes") == plain_task.row("is this thing red", "yes")
    short, long = (Batch(opened(["a"], prompt), pictures(FEATURES[:1])) for prompt in ("this thing", "is this thing red"))
    assert task.generate(short) == plain_task.generate(long)


def test_several_references_are_scored_softly_whatever_the_answer_was_chosen_by(folder):
    """Of three samples the first has the answer of three of ten people, the second that of all, the third that of none."""
    task = make(folder)
    people = [("red",) * 3 + ("blue",) * 7, ("The blue square.",) * 10, ("no",) * 10]
    asked = [replace(s, references=r) for s, r in zip(samples(), people, strict=True)]
    said = iter(["red", "blue square", "yes"])
    task._chosen = lambda sample, score: {"predicted": next(said), "correct": True, "scored_by": "candidates"}
    found = task.predict(Batch(asked, pictures(FEATURES)))
    assert [p.values["soft_accuracy"] for p in found] == pytest.approx([0.9, 1.0, 0.0])
    assert task.score(asked, found)["soft_accuracy"] == pytest.approx(1.9 / 3)
    some = [replace(asked[0], references=("red",)), *asked[1:]]
    del found[0].values["soft_accuracy"]
    assert "soft_accuracy" not in task.score(some, found)  # a mean over a part of them would stand for all


def test_baselines_have_a_soft_accuracy_beside_their_accuracy(folder):
    asked = [replace(s, id=s.answer, references=(s.answer,) * 4 + ("grey",)) for s in opened(["red", "red", "blue"])]
    asked = [replace(s, id=str(i)) for i, s in enumerate(asked)]
    table = {s.id: torch.eye(3)[{"red": 0, "blue": 1}[s.answer]] for s in asked}
    splits = Splits(asked, lambda: (asked, asked), lambda: asked, lambda part: torch.stack([table[s.id] for s in part]), 0)
    found = make(folder).baselines(splits)
    assert found["majority answer"] == {"accuracy": 2 / 3, "samples": 3, "soft_accuracy": 2 / 3}
    assert found["linear probe on the same features"]["soft_accuracy"] == 1.0
    assert set(found["linear probe on the same features"]["inverse_regularisation"]) == {"this thing is a"}


def test_two_references_are_too_few_for_a_whole_soft_accuracy():
    asked = [replace(s, references=("red",) * n) for n, s in zip((0, 1, 2, 3, 4), opened(["red"] * 5), strict=True)]
    (line,) = [line for line in AnswerTask.caution(asked, "val", {}) if "references" in line]
    assert line.startswith("val: 2 samples have two or three references")
