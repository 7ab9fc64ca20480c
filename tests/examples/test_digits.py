"""The two data sets of handwritten digits: right answers, no drawing in two splits, deterministic."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mitrain_demo import digits
from sklearn.datasets import load_digits

from mitrain.data.formats.records import read_records
from mitrain.data.formats.refcoco import read_refer
from mitrain.data.images import open_image


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("digits")
    digits.build_answers([], target, 0)
    return target


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("digit-scenes")
    digits.build_scenes([], target, 0)
    return target


def test_answers_are_the_bundled_labels(answers):
    labels = load_digits().target
    for split, count in digits.DRAWINGS.items():
        samples = read_records(answers / f"{split}.jsonl")
        assert len(samples) == 2 * count
        for sample in samples:
            digit = int(labels[int(sample.inputs["image"].removeprefix("images/").removesuffix(".png"))])
            if sample.kind == "digit":
                assert sample.answer == digits.WORDS[digit] and sample.candidates == digits.WORDS
            else:
                asked_odd = "odd" in sample.prompt
                assert sample.answer == ("yes" if (digit % 2 == 1) == asked_odd else "no")


def test_yes_and_no_are_about_as_frequent_for_both_questions(answers):
    samples = [sample for sample in read_records(answers / "train.jsonl") if sample.kind == "yesno"]
    counts = Counter((sample.prompt, sample.answer) for sample in samples)
    assert len(counts) == 4
    assert min(counts.values()) > 0.2 * len(samples)


def test_no_drawing_is_in_two_splits(answers):
    where = {}
    for split in digits.DRAWINGS:
        for sample in read_records(answers / f"{split}.jsonl"):
            assert where.setdefault(open_image(answers, sample.inputs["image"]).tobytes(), split) == split


def test_pictures_show_dark_ink_on_light_paper(answers):
    sample = read_records(answers / "train.jsonl")[0]
    pixels = np.asarray(open_image(answers, sample.inputs["image"]))
    assert pixels.shape == (digits.SIDE, digits.SIDE, 3)
    assert pixels.min() < 60 and np.median(pixels) > 200


def test_scenes_are_read_back(scenes):
    for split, count in digits.SCENES.items():
        samples = read_refer(scenes, "refcoco", None, split)
        assert len({sample.inputs["image"] for sample in samples}) == count
        assert all(sample.object in digits.WORDS and sample.object in sample.expression for sample in samples)
        assert all(0.005 < sample.mask().mean() < 0.2 for sample in samples)


def test_builds_are_deterministic(answers, scenes, tmp_path):
    for build, first, name in (
        (digits.build_answers, answers, "train.jsonl"),
        (digits.build_scenes, scenes, "refcoco/instances.json"),
    ):
        for seed, same in ((0, True), (1, False)):
            target = tmp_path / f"{name[0]}{seed}"
            target.mkdir()
            build([], target, seed)
            assert ((target / name).read_bytes() == (first / name).read_bytes()) == same
