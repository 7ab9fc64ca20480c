"""Scores that are decided before any model speaks are told, or refused where nothing else is left."""

from dataclasses import replace

import pytest

from mitrain.core.errors import DataError
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.formats.labels import LabelSample
from mitrain.data.formats.records import AnswerSample
from mitrain.data.formats.refcoco import ReferSample
from mitrain.tasks import base
from mitrain.tasks.answer import AnswerTask
from mitrain.tasks.classify import ClassifyTask
from mitrain.tasks.retrieve import RetrieveTask
from mitrain.tasks.segment import SegmentTask

EMPTY, HALF, FULL = ({"size": [6, 8], "counts": counts} for counts in ([48], [24, 24], [0, 48]))

TASKS = {AnswerSample: AnswerTask, CaptionSample: RetrieveTask, LabelSample: ClassifyTask, ReferSample: SegmentTask}


def cautions(samples, split, known=None):
    return base.cautions(TASKS[type(samples[0])] if samples else AnswerTask, samples, split, known)


def answer(text, candidates=(), prompt="p"):
    return AnswerSample(text, {"image": "a.png"}, prompt, text, candidates)


def masks(*segmentations):
    return [ReferSample(str(i), {"image": "a.png"}, "x", (6, 8), s, "o") for i, s in enumerate(segmentations)]


def captions(pairs):
    return [CaptionSample(str(i), {"image": image}, text, image) for i, (image, text) in enumerate(pairs)]


def labels(*sets):
    return [LabelSample(str(i), {"image": "a.png"}, "t", tuple(names)) for i, names in enumerate(sets)]


def test_what_can_be_wrong_has_no_caution():
    assert cautions([answer("a", ("a", "b")), answer("b", ("a", "b"))], "val") == []
    assert cautions(labels("a", "b"), "val") == cautions(labels("a", "ab"), "val") == []
    assert cautions(captions([(str(i), f"t{i}") for i in range(11)]), "val") == []
    assert cautions(masks(HALF, FULL), "val") == []


def test_answers_without_a_choice_say_how_they_are_scored():
    samples = [answer("a"), answer("b", ("b",)), answer("c", ("c", "d")), answer("e", prompt="q")]
    (line,) = cautions(samples, "val", {"p": ("a", "b")})
    assert line == (
        "val: 3 of 4 samples have no candidates to choose from (1 have one, which cannot be wrong): 2 are ranked among the"
        " training answers to their prompt, 1 are right where the generated text is the answer"
    )
    assert cautions(samples, "val", {"p": ("a", "z")})[1].startswith(
        "val: 1 samples have an answer that training never gave"
    )
    assert "0 are ranked" in cautions(samples, "val")[0]
    for count, ranked in ((1, 0), (2, 2), (100, 2), (101, 0)):
        known = {"p": ("a", "b", *map(str, range(2, count)))[:count]}
        assert f"{ranked} are ranked" in cautions(samples, "val", known)[0]


def test_one_answer_and_one_label_are_pointed_out():
    (line,) = cautions([answer("a" * 70, ("a" * 70, "b"))], "val")
    assert line == (
        f"val: every sample has the answer {'a' * 60!r}, so that always giving it is right every time:"
        " a score says nothing of the inputs"
    )
    (line,) = cautions(labels("a", "a"), "val")
    assert line == (
        "val: every sample has the label 'a', so that always giving it is right every time:"
        " a score says nothing of the inputs"
    )
    assert cautions(labels("ab", "ba"), "val")[0].startswith("val: every sample has all 2 labels")


def test_answers_that_look_alike_are_pointed_out():
    samples = [answer(text, ("1", "1.0", "2")) for text in ("1", "1.0", "2")]
    assert cautions(samples, "val") == ["val: the answers '1' and '1.0' count as two"]
    assert cautions(labels(["food"], ["Food"], ["x"]), "val") == ["val: the labels 'Food' and 'food' count as two"]


def test_rankings_that_cannot_be_wrong_are_named():
    (line,) = cautions(captions([(str(i), f"t{i}") for i in range(6)]), "val")
    assert line == ("val: i2t_r10, t2i_r10 cannot be wrong among 6 files and 6 texts and are left out of recall_mean")


def test_masks_without_an_object_are_counted():
    assert cautions(masks(EMPTY, HALF), "val") == ["val: 1 of 2 masks are empty; their IoU is 0 whatever is found"]
    assert cautions(masks(FULL, FULL), "val")[0].startswith("val: every mask covers its whole picture")


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([], "holds no sample"),
        (labels("", ""), "no sample has a label"),
        (
            captions([("a", "x"), ("a", "y")]),
            r"^val: 1 file\(s\) and 2 different text\(s\) leave nothing that a ranking could get wrong: give more$",
        ),
        (captions([("a", "x"), ("b", "x")]), r"2 file\(s\) and 1 different text\(s\) leave nothing"),
        (masks(EMPTY, EMPTY), "no mask has an object in it"),
    ],
)
def test_a_score_that_is_decided_is_refused(samples, match):
    with pytest.raises(DataError, match=match):
        cautions([replace(s) for s in samples], "val")
