"""The inspection of a data set finds what was planted: broken files, skewed answers, shared objects and pixels."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mitrain.data import inspection
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.formats.labels import LabelSample
from mitrain.data.formats.records import AnswerSample
from mitrain.data.formats.refcoco import ReferSample
from mitrain.tasks.answer import AnswerTask
from mitrain.tasks.classify import ClassifyTask
from mitrain.tasks.retrieve import RetrieveTask
from mitrain.tasks.segment import SegmentTask

FULL = {"size": [6, 8], "counts": [0, 48]}
HALF = {"size": [6, 8], "counts": [24, 24]}


def picture(folder, name: str, seed: int) -> str:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name)
    return name


def answers(folder, split: str, count: int, first: int) -> list[AnswerSample]:
    return [
        AnswerSample(
            id=f"{split}{number}",
            inputs={"image": picture(folder, f"{split}{number}.png", first + number)},
            prompt="What is it?",
            answer="cat" if number else "dog",
            kind="category",
            object=f"thing {first + number}",
        )
        for number in range(count)
    ]


def expressions(folder, split: str, count: int, first: int) -> list[ReferSample]:
    return [
        ReferSample(
            id=f"{split}{number}",
            inputs={"image": picture(folder, f"{split}{number}.png", first + number)},
            expression=f"the thing {first + number}",
            size=(6, 8),
            segmentation=HALF,
            object=f"thing {first + number}",
            kind="name",
        )
        for number in range(count)
    ]


def inspect_splits(splits, *rest, **options):
    tasks = {AnswerSample: AnswerTask, CaptionSample: RetrieveTask, LabelSample: ClassifyTask, ReferSample: SegmentTask}
    return inspection.inspect_splits(tasks[type(next(iter(splits.values()))[0])], splits, *rest, **options)


def shared(report) -> dict[str, int]:
    return {found["what"]: found["count"] for found in report["shared"]}


def test_a_clean_data_set(tmp_path):
    splits = {"train": answers(tmp_path, "train", 4, 0), "test": answers(tmp_path, "test", 2, 10)}
    report, text = inspect_splits(splits, tmp_path)
    train = report["splits"]["train"]
    assert (train["samples"], train["pictures"], train["broken_pictures"], train["objects"]) == (4, 4, 0, 4)
    assert train["kinds"]["category"] == {
        "samples": 4,
        "different": 2,
        "majority": 0.75,
        "answers": {"cat": 3, "dog": 1},
    }
    assert report["shared"] == [] and "no two splits share" in text
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("make", [answers, expressions])
def test_everything_that_two_splits_share_is_found(tmp_path, make):
    train, test = make(tmp_path, "train", 3, 0), make(tmp_path, "test", 3, 10)
    (tmp_path / "test1.png").write_bytes((tmp_path / "train0.png").read_bytes())  # the same pixels, another name
    test[0] = replace(test[0], id="train1")
    test[2] = replace(test[2], object="thing 2", inputs={"image": "train2.png"})
    report, text = inspect_splits({"train": train, "test": test}, tmp_path)
    assert shared(report) == {"id": 1, "picture": 1, "pixels": 2, "object": 1}
    found = {entry["what"]: entry for entry in report["shared"]}
    assert found["id"]["examples"] == ["train1"] and found["object"]["examples"] == ["thing 2"]
    assert sorted(found["pixels"]["examples"]) == ["test1.png", "train2.png"]
    assert found["id"]["splits"] == ["train", "test"] and found["id"]["share"] == 0.3333
    assert "train and test share the same object: 1 (33.3 % of test), e.g. thing 2" in text


def test_a_leak_is_a_share_of_the_split_that_is_scored(tmp_path):
    train, test = answers(tmp_path, "train", 6, 0), answers(tmp_path, "test", 2, 10)
    test[0] = replace(test[0], object="thing 2")
    report, text = inspect_splits({"train": train, "test": test}, tmp_path)
    (found,) = report["shared"]
    assert found["count"] == 1 and found["share"] == 0.5 and "1 (50.0 % of test)" in text


def test_missing_and_broken_pictures_are_counted_and_named(tmp_path):
    samples = answers(tmp_path, "train", 4, 0)
    (tmp_path / "train1.png").unlink()
    (tmp_path / "train2.png").write_bytes(b"torn")
    samples.append(replace(samples[0], id="same picture again"))
    report, text = inspect_splits({"train": samples}, tmp_path, sheet=tmp_path / "sheet.png")
    train = report["splits"]["train"]
    assert (train["samples"], train["pictures"], train["broken_pictures"]) == (5, 4, 2)
    assert list(train["broken_examples"]) == ["train1.png", "train2.png"]
    assert "train1.png" in text and (tmp_path / "sheet.png").exists()


def test_masks_are_measured(tmp_path):
    train = expressions(tmp_path, "train", 5, 0)
    train[1] = replace(train[1], segmentation=FULL)
    train[2] = replace(train[2], segmentation={"size": [6, 8], "counts": [48]})
    train[3] = replace(train[3], segmentation={"size": [6, 8], "counts": [7]}, expression=train[0].expression)
    report, text = inspect_splits({"train": train}, tmp_path, sheet=tmp_path / "sheet.png")
    facts = report["splits"]["train"]
    assert (facts["expressions"], facts["broken_masks"], facts["empty_masks"]) == (4, 1, 1)
    assert facts["mean_area"] == 0.5 and "train3" in facts["broken_mask_examples"]
    assert facts["areas"]["20-50 %"] == 2 and facts["areas"]["50-100 %"] == 1 and facts["areas"]["0-1 %"] == 1
    assert sum(facts["areas"].values()) == 4
    assert "broken_masks: 1" in text


def test_the_sheet_shows_pictures_and_masks(tmp_path):
    train = expressions(tmp_path, "train", 2, 0)
    Image.new("RGB", (8, 6), (0, 0, 240)).save(tmp_path / "train0.png")
    Image.new("RGB", (8, 6), (0, 0, 240)).save(tmp_path / "train1.png")
    inspect_splits({"train": train}, tmp_path, sheet=tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    blue = (np.abs(sheet - (40, 40, 220)).sum(2) < 12).sum()
    tinted = (np.abs(sheet - (127, 20, 140)).sum(2) < 12).sum()
    assert tinted > 1000 and 0.8 < blue / tinted < 1.25  # half of each picture is masked
    assert (sheet.sum(2) < 200).any()  # the expression


def test_the_sheet_is_drawn_from_the_seed(tmp_path):
    splits = {"train": answers(tmp_path, "train", 30, 0)}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        inspect_splits(splits, tmp_path, sheet=tmp_path / f"{name}.png", seed=seed)
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again != other


def test_a_text_of_any_length_costs_the_sheet_and_the_report_a_few_words(tmp_path):
    long = LabelSample("a", {"image": picture(tmp_path, "a.png", 0)}, "word " * 2_000_000, ("x",))
    shown = inspection.panel(ClassifyTask, "train", long, tmp_path, 1 << 20, ["image"])
    assert len(shown.lines) <= 4 and max(map(len, shown.lines)) < 40
    report, text = inspect_splits({"train": [long], "val": [replace(long, id="b")]}, tmp_path)
    assert len(text) < 5000 and len(json.dumps(report)) < 5000


def test_a_picture_of_another_size_than_its_annotation_is_reported_on_the_sheet(tmp_path):
    train = expressions(tmp_path, "train", 3, 0)
    Image.new("RGB", (80, 61)).save(tmp_path / "train0.png")
    Image.new("RGB", (80, 60)).save(tmp_path / "train1.png")
    report, text = inspect_splits({"train": train}, tmp_path, sheet=tmp_path / "sheet.png")
    found = report["splits"]["train"]
    assert found["wrong_sizes"] == 1 and list(found["wrong_size_examples"]) == ["train0.png"]
    assert found["read"] == {"as a scaled copy of what was annotated": 1}
    assert "wrong_sizes: 1" in text


def test_a_thin_picture_has_its_place_on_the_sheet(tmp_path):
    train = answers(tmp_path, "train", 2, 0)
    Image.new("L", (4000, 1)).save(tmp_path / "train0.png")
    Image.new("L", (1, 4000)).save(tmp_path / "train1.png")
    report, _ = inspect_splits({"train": train}, tmp_path, sheet=tmp_path / "sheet.png")
    assert report["splits"]["train"]["broken_pictures"] == 0


def test_a_picture_is_on_the_sheet_whatever_its_input_is_called(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    for name in ("image", "photo"):
        split = {"train": [LabelSample("a", {name: "a.png"}, "this", ("x",))]}
        inspection.inspect_splits(ClassifyTask, split, tmp_path, tmp_path / f"on-{name}.png", media={name: "image"})
    assert (tmp_path / "on-image.png").read_bytes() == (tmp_path / "on-photo.png").read_bytes()
