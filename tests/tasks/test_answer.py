"""The answer task: its loss and scores against a computation by hand."""

from dataclasses import replace

import pytest
import torch
from answers import FEATURES, make, opened, samples
from modalities import pictures

from mitrain.core.errors import DataError
from mitrain.data.formats.records import AnswerSample
from mitrain.models import text as text_module
from mitrain.models.layouts import layers_of
from mitrain.tasks import language
from mitrain.tasks.answer import same_text
from mitrain.tasks.base import Batch


def by_hand(task, prompt, answer, feature):
    """log p of the answer's tokens and its end, one sample at a time, from the model's bottom."""
    text = task.parts.text
    ids = [*text.tokens(f"{prompt} {answer}"), text.tokenizer.eos_token_id]
    start = len(text.tokens(prompt))
    with task.parts.adapter.bind({"image": feature}):
        logits = text.model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return sum(logits[t - 1, ids[t]] for t in range(start, len(ids))), len(ids) - start


@pytest.mark.parametrize("gate", ["prefix", "sequence"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_is_the_answers_negative_log_likelihood(folder, tmp_path, cached, gate):
    task = make(folder, tmp_path if cached else None, gate)
    task.parts.states.prepare(task.texts(samples(), False))
    total, count = task.loss(Batch(samples(), pictures(FEATURES)))
    found = [by_hand(task, s.prompt, s.answer, FEATURES[i : i + 1]) for i, s in enumerate(samples())]
    torch.testing.assert_close(total, -sum(value for value, _ in found), rtol=1e-5, atol=1e-5)
    assert float(count) == sum(n for _, n in found)
    total.backward()
    assert task.parts.adapter.infusions[0].head_logit.grad.abs().sum() > 0


def test_earlier_turns_are_put_to_the_model_as_the_setting_says(folder):
    """Loss, candidates and what is said: as of the same words as one prompt; without the setting, as lines."""
    turns = ("this thing is a", "red square", "is this red")
    (plain,) = opened(["yes"], "\n".join(turns))
    talk = [replace(plain, turns=turns, candidates=("yes", "no"))]
    for setting, words in (
        ("", "\n".join(turns)),
        ("{prompt} {answer} and ", "this thing is a red square and is this red"),
    ):
        task, single = make(folder, turn=setting), make(folder)
        one = [replace(plain, prompt=words, candidates=("yes", "no"))]
        assert task.texts(talk, True) == single.texts(one, True)
        seen = pictures(FEATURES[:1])
        assert torch.equal(task.loss(Batch(talk, seen))[0], single.loss(Batch(one, seen))[0])
        found, expected = (t.predict(Batch(s, seen), generate=True)[0].values for t, s in ((task, talk), (single, one)))
        assert found["probabilities"] == expected["probabilities"] and found["generated"] == expected["generated"]


@pytest.mark.parametrize("normalize", [False, True])
def test_candidates_are_ranked_by_likelihood(folder, normalize):
    task = make(folder, normalize=normalize)
    predictions = task.predict(Batch(samples(), pictures(FEATURES)))
    for i, (sample, prediction) in enumerate(zip(samples(), predictions, strict=True)):
        with torch.no_grad():
            found = [by_hand(task, sample.prompt, c, FEATURES[i : i + 1]) for c in sample.candidates]
        scores = torch.stack([value / (count if normalize else 1) for value, count in found])
        expected = dict(zip(sample.candidates, scores.softmax(0).tolist(), strict=True))
        assert prediction.values["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert prediction.values["predicted"] == max(expected, key=expected.get)


@pytest.mark.parametrize("cached", [False, True])
def test_prompts_that_several_answers_stand_behind_are_read_once(folder, tmp_path, monkeypatch, cached):
    """Prompts and answers of several lengths in one batch: scores as of whole rows, from fewer tokens in infused layers, and
    what follows a prompt is asked of the head once."""
    seen, asked, found = [], {}, {}
    batch = Batch(samples(), pictures(FEATURES))
    for case in ("once", "again", "large"):
        task = make(folder, tmp_path if cached else None)
        task.parts.states.prepare(task.texts(samples(), True))
        assert task.parts.states.cached == cached
        task.begins = case != "again" and task.begins
        monkeypatch.setattr(language, "LARGE_CACHE", 0 if case == "large" else 2**30)
        seen.append(0)
        layers_of(task.parts.text.model)[1].mlp.register_forward_hook(
            lambda _, args, out: seen.append(seen.pop() + out[..., 0].numel())
        )
        heads = asked.setdefault(case, [])
        head = task.parts.text.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, args, heads=heads: heads.append(len(args[0])))
        found[case] = task.candidate_scores(batch)
    for case in ("again", "large"):
        torch.testing.assert_close(found["once"], found[case], rtol=0, atol=1e-5)
    answers = [(s, len(task.row(s.prompt, c)) - len(task.prompt_ids(s.prompt)) + 1) for s in samples() for c in s.candidates]
    assert sum(asked["again"]) == sum(count for _, count in answers)
    assert sum(asked["once"]) == len(samples()) + sum(count - 1 for _, count in answers)
    assert 0 < seen[0] < seen[1] < seen[2], "too large a cache is found out by reading the prompts"


def test_what_is_kept_of_prompts_but_keys_and_values_is_not_gone_on_from_with_states(folder, tmp_path, monkeypatch):
    task = make(folder, tmp_path)
    monkeypatch.setattr(text_module, "DynamicLayer", int)  # as a model with sliding windows or without attention has others
    inputs = pictures(FEATURES[:2])
    assert task.beginnings([("this is a", "red"), ("this is a", "blue")] * 2, inputs, [0, 0, 1, 1], 4) is None


def test_a_gate_that_sees_the_whole_sequence_has_its_prompts_read_with_each_answer(folder):
    assert make(folder, gate="prefix").begins and not make(folder, gate="sequence").begins


def test_without_candidates_the_training_answers_to_the_prompt_are_ranked(folder):
    task, asked = make(folder), opened(["red", "blue", "yes"])
    task.remember([*asked[:2], *opened(["green", "red"]), *opened(["no", "yes"], "is this red")])
    assert not task.must_generate(asked)
    found = [p.values for p in task.predict(Batch(asked, pictures(FEATURES)))]
    assert all(set(v["probabilities"]) == {"red", "blue", "green"} and v["scored_by"] == "training answers" for v in found)
    assert all(v["correct"] == (v["predicted"] == s.answer) for v, s in zip(found, asked, strict=True))
    assert found[2]["correct"] is False  # training never gave its answer: it is not slipped in
    wrong = opened([next(a for a in ("red", "blue") if a != v["predicted"]) for v in found])
    predictions = task.predict(Batch(wrong, pictures(FEATURES)))
    metrics = task.score(wrong, predictions)
    assert metrics["accuracy"] == 0.0 and metrics["scored_by"] == {"training answers": 3}
    others = [p.values["probabilities"] for p in task.predict(Batch(asked, pictures(FEATURES.flip(0))))]
    assert others[0] != found[0]["probabilities"]  # the picture decides, so that controls can change it
    ranked = task.predict(
        Batch([replace(s, candidates=("red", "blue", "green")) for s in asked[:1]], pictures(FEATURES[:1]))
    )
    assert ranked[0].values["probabilities"] == pytest.approx(found[0]["probabilities"], abs=2e-6)


@pytest.mark.parametrize("known", [["red"], [], [f"thing {i}" for i in range(101)]])
def test_where_there_is_nothing_to_rank_the_model_must_say_the_answer(folder, known):
    task, asked = (
        make(folder),
        [replace(opened(["red"])[0], candidates=offered) for offered in ((), ("red",), ("red",) * 3)],
    )
    task.remember([replace(s, candidates=()) for s in opened(known)])
    assert task.must_generate(asked)
    found = task.predict(Batch(asked, pictures(FEATURES)))
    said = task.generate(Batch(asked, pictures(FEATURES)))
    for prediction, words in zip(found, said, strict=True):
        values = prediction.values
        assert values["predicted"] == values["generated"] == words and "probabilities" not in values
        assert values["scored_by"] == "generation" and values["correct"] is values["exact_match"] is (words == "red")
    right = [replace(s, answer=f" {w.upper()}.") for s, w in zip(asked, said, strict=True)]
    metrics = task.score(right, task.predict(Batch(right, pictures(FEATURES))))
    assert metrics["accuracy"] == metrics["exact_match"] == 1.0 and metrics["scored_by"] == {"generation": 3}


def test_a_batch_of_both_kinds_keeps_its_order(folder):
    task = make(folder)
    mixed = [*samples()[:1], *opened(["red"]), *samples()[2:]]
    alone = [task.predict(Batch([s], pictures(FEATURES[i : i + 1])))[0].values for i, s in enumerate(mixed)]
    found = [p.values for p in task.predict(Batch(mixed, pictures(FEATURES)))]
    assert [v["scored_by"] for v in found] == ["candidates", "generation", "candidates"]
    assert [v["predicted"] for v in found] == [v["predicted"] for v in alone]


@pytest.mark.parametrize("truth", ["blue", "red", "yellow"])
def test_ties_count_against_the_truth(folder, truth):
    sample = AnswerSample("0", {"image": "0.png"}, "p", truth, ("yellow", "blue", "red"))
    prediction = make(folder)._prediction(sample, torch.tensor([-1.0, -1.0, -1.0]), None)
    assert prediction.values["correct"] is False and prediction.values["predicted"] == {"blue": "red"}.get(truth, "blue")
    best = make(folder)._prediction(
        sample,
        torch.tensor([-1.0, -1.0, -1.0]).index_fill(0, torch.tensor([sample.candidates.index(truth)]), -0.5),
        None,
    )
    assert best.values["correct"] is True


def test_scores_and_words_of_what_is_no_number_are_reported(folder):
    task, features = make(folder), FEATURES.clone()
    features[1, 0] = torch.nan
    assert [p.finite for p in task.predict(Batch(samples(), pictures(features)))] == [True, False, True]
    assert [p.finite for p in task.predict(Batch(opened(["red"] * 3), pictures(features)))] == [True, False, True]


@pytest.mark.parametrize(
    ("said", "answer", "same"),
    [
        ("Dog.", " dog", True),
        ("a  dog\n", "A dog", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("?", "!", False),
        ("dogs", "dog", False),
        ("", "dog", False),
    ],
)
def test_answers_are_compared_but_for_case_white_space_and_closing_marks(said, answer, same):
    assert same_text(said, answer) is same


def test_what_a_model_brings_for_generation_does_not_act(folder):
    """As Qwen's repetition_penalty, BART's no_repeat_ngram_size and Whisper's suppressed tokens would."""
    task = make(folder)
    said = task.generate(Batch(samples(), pictures(FEATURES)))
    first = task.parts.text.tokenizer(said[0])["input_ids"][0]
    task.parts.text.model.generation_config.update(
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[first],
        num_beams=3,
        min_length=30,
        do_sample=True,
    )
    assert task.generate(Batch(samples(), pictures(FEATURES))) == said


def test_generation_equals_greedy_steps_without_a_cache(folder):
    task = make(folder, max_new_tokens=5)
    text = task.parts.text
    said = task.generate(Batch(samples(), pictures(FEATURES)))
    for i, sample in enumerate(samples()):
        ids = text.tokens(sample.prompt)
        start = len(ids)
        with torch.no_grad(), task.parts.adapter.bind({"image": FEATURES[i : i + 1]}):
            while len(ids) < start + 5 and (len(ids) == start or ids[-1] != text.tokenizer.eos_token_id):
                ids.append(int(text.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert said[i] == text.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_of_prompts_that_repeat_each_runs_through_the_lower_layers_once(folder, tmp_path):
    """Of other lengths, one the other's end, with pictures of their own: what is said is what is said without it."""
    asked = opened(["red"] * 6)
    asked = [replace(s, prompt=("this thing is a", "thing is a")[i % 2]) for i, s in enumerate(asked)]
    batch, said, ran = Batch(asked, pictures(torch.cat([FEATURES, -FEATURES]))), {}, {}
    for case in ("alike", "each", "single"):
        task = make(folder, None if case == "each" else tmp_path, max_new_tokens=4)
        seen = ran.setdefault(case, [])
        layers_of(task.parts.text.model)[0].register_forward_hook(lambda *_, seen=seen: seen.append(_[2].shape[:2].numel()))
        assert task.begins and task.parts.states.cached == (case != "each")  # which the model is asked by short texts
        seen.clear()
        if case == "single":
            batch = Batch(asked[:3], pictures(FEATURES))
        said[case] = task.generate(batch)
    assert said["alike"] == said["each"] and said["single"] == said["each"][:3] and len(set(said["each"])) > 2
    longest = len(task.prompt_ids(asked[0].prompt))
    assert ran["each"][0] == 6 * longest
    assert ran["alike"][:2] == [2 * (longest - 1), 6], "two prompts but for their last tokens, and six last tokens"
    assert ran["single"][0] == 3 * longest, "two of three are too many to spare anything"


def test_samples_with_the_same_prompt_are_scored_together_the_shorter_ones_first(folder):
    asked = opened(["red"] * 6)
    asked = [replace(s, prompt=("this thing is a", "what is it", "what is on")[i % 3]) for i, s in enumerate(asked)]
    asked[2] = replace(asked[2], turns=("this thing is a", "red", "what is on"))
    assert make(folder).order(asked) == [1, 4, 2, 5, 0, 3]
    assert make(folder, turn="{prompt} {answer} and ").order(asked) == [1, 4, 5, 0, 3, 2], "with its turns it is the longest"


def test_scores_count_by_kind_and_name_the_majority(folder):
    task = make(folder)
    predictions = task.predict(Batch(samples(), pictures(FEATURES)), generate=True)
    for prediction, correct in zip(predictions, (True, False, True), strict=True):
        prediction.values["correct"] = correct
    metrics = task.score(samples(), predictions)
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["samples"] == 3
    assert metrics["accuracy/kind0"] == 1.0 and metrics["accuracy/kind1"] == 0.0
    assert metrics["majority"] == pytest.approx(1 / 3) and "exact_match" in metrics


def test_the_image_matters_and_a_missing_one_is_the_frozen_model(folder):
    task = make(folder)
    with torch.no_grad():
        with_image, _ = task.loss(Batch(samples(), pictures(FEATURES)))
        other, _ = task.loss(Batch(samples(), pictures(FEATURES.flip(0))))
        blind, _ = task.loss(Batch(samples(), None))
        task.parts.adapter.detach()
        ids, mask = task.parts.text.pad([task.row(s.prompt, s.answer) for s in samples()])
        frozen = task.parts.text.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    assert not torch.isclose(with_image, other) and not torch.isclose(with_image, blind)
    ends = [[*task.row(s.prompt, s.answer), task.parts.text.tokenizer.eos_token_id] for s in samples()]
    starts = [len(task.parts.text.tokens(s.prompt)) for s in samples()]
    picked = [frozen[i, t - 1, row[t]] for i, row in enumerate(ends) for t in range(starts[i], len(row))]
    torch.testing.assert_close(blind, -sum(picked), rtol=1e-5, atol=1e-5)


def test_a_prompt_leaves_space_for_what_is_said_behind_it(folder):
    task = make(folder, max_new_tokens=62)  # of 64 positions
    assert task.texts(samples(), True) and len(task.parts.text.tokens(samples()[0].prompt)) == 6
    with pytest.raises(DataError, match=r"a prompt of 6 tokens leaves no room for 62 more in the model's 64: lower task\."):
        task.texts(samples(candidates=False), True)
    with pytest.raises(DataError, match="a prompt of 6 tokens leaves no room for 62 more"):
        task.generate(Batch(samples(), pictures(FEATURES)))


def test_what_a_model_says_of_caches_does_not_act(folder, tmp_path):
    asked = [replace(s, prompt="thing is a") for s in opened(["red"] * 6)]
    batch = Batch(asked, pictures(torch.cat([FEATURES, -FEATURES])))
    expected = make(folder, max_new_tokens=4).generate(batch)
    for setting in ({"use_cache": False}, {"cache_implementation": "dynamic"}):
        task = make(folder, tmp_path, max_new_tokens=4)
        task.parts.text.model.generation_config.update(**setting)
        assert task.generate(batch) == expected
