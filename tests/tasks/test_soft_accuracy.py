"""VQAv2's soft accuracy and the writings that it takes for one.

The normalised forms below are those that the official evaluation code makes of the same answers.
"""

import itertools
import random

import pytest

from mitrain.tasks.soft_accuracy import CONTRACTIONS, SPELT, normalised, soft_accuracy


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The Two  dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("a/b", "b"),
        ("2-story, red", "2 story red"),
        ("x-ray - y", "xray y"),
        ("100,978 cats!", "100978 cats"),
        ("1,000-2", "10002"),
        ("don't; dont", "don't don't"),
        ("yall'd've", "y'all'd've"),
        ("couldntve", "couldntve"),
        ("its", "its"),
        ("girl's", "girl's"),
        ("It's 2:50\tpm.", "it's 2:50 pm"),
        ("1.5 m.", "1.5 m"),
        ("U.S.A", "usa"),
        (".5", ".5"),
        ("(yes)", "yes"),
        ("?!", ""),
        ("Im", "im"),
    ],
)
def test_normalised_forms(answer, form):
    assert normalised(answer) == form


def test_a_contraction_may_lack_any_one_of_its_apostrophes():
    assert len(CONTRACTIONS) == len(set(CONTRACTIONS)) == 92 and len(SPELT) == 113
    assert {normalised(w) for w in ("y'all'dve", "yall'd've", "y'alld've", "y'all'd've")} == {"y'all'd've"}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10])
def test_it_is_the_mean_over_all_subsets_that_leave_one_person_out(count):
    drawn = random.Random(count)
    for _ in range(50):
        references = [drawn.choice(["cat", "A cat.", "dog", "2"]) for _ in range(count)]
        subsets = list(itertools.combinations(references, count - 1))
        shares = [min(1, sum(r in ("cat", "A cat.") for r in subset) / 3) for subset in subsets]
        assert soft_accuracy("the cat", references) == pytest.approx(sum(shares) / len(subsets))


def test_three_of_ten_are_nine_tenths():
    assert soft_accuracy("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx(0.9)
    assert soft_accuracy("yes", ["yes"] * 4 + ["no"] * 6) == 1.0 and soft_accuracy("x", ["yes"] * 10) == 0.0
    assert soft_accuracy("yes", ["yes", "yes"]) == pytest.approx(1 / 3)
