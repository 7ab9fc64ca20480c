"""Referring expressions of one's own in COCO's JSON."""

import json

import numpy as np
import pytest
from PIL import Image

from mitrain.core.errors import DataError
from mitrain.data.expressions import ExpressionsConfig
from mitrain.data.formats.rle import encode_mask

SQUARE = np.zeros((20, 30), bool)
SQUARE[5:10, 5:15] = True


def things(count=2, **first):
    """Pictures, each with a named square that is spoken of and a thing that is not."""
    annotations = []
    for i in range(count):
        own = {"image_id": i, "category_id": 1, "segmentation": encode_mask(SQUARE)}
        annotations += [{"id": 2 * i, **own, "expression": f"square {i}"}, {"id": 2 * i + 1, **own, "category_id": 2}]
    annotations[0] |= first
    images = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(count)]
    names = [{"id": 1, "name": "square"}, {"id": 2, "name": "ball"}]
    return {"images": images, "annotations": annotations, "categories": names}


def written(folder, values, places="images"):
    (folder / places).mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for image in values["images"]:
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / places / image["file_name"])
    (folder / "train.json").write_text(json.dumps(values))
    return folder


def read(folder, split="train", **more):
    return ExpressionsConfig(root=str(folder), **more).read(folder, split)


def test_an_annotation_with_an_expression_is_a_sample(tmp_path):
    first, second = read(written(tmp_path, things()))
    assert (first.id, first.expression, first.inputs) == ("0", "square 0", {"image": "images/0.png"})
    assert (first.object, first.present, first.size) == ("square", ("ball", "square"), (20, 30))
    assert np.array_equal(first.mask(), SQUARE) and second.id == "2"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"expression": ["the square", "it "]}, ["the square", "it"]),
        ({"expression": None, "caption": "a square"}, ["a square"]),
        ({"expression": None, "sentences": [{"raw": "A square", "sent": "a square"}]}, ["A square"]),
        ({"expression": " "}, []),
    ],
)
def test_expressions_stand_under_the_usual_names(tmp_path, own, expected):
    found = read(written(tmp_path, things(**own)))
    assert [sample.expression for sample in found] == [*expected, "square 1"]


def test_polygons_other_names_and_places(tmp_path):
    pytest.importorskip("pycocotools")
    values = things(expression=None, what="it", segmentation=[[5, 5, 15, 5, 15, 10, 5, 10]])
    (sample,) = read(written(tmp_path, values, "photos"), expression="what", images="photos")
    assert np.array_equal(sample.mask(), SQUARE) and sample.inputs == {"image": "photos/0.png"}


def test_shares_are_drawn_by_pictures_not_by_names(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    data = {"splits": {"train": "train.json"}, "val_share": 0.25}
    parts = {split: read(written(tmp_path, things(8)), split, **data) for split in ("train", "val")}
    assert [len(part) for part in parts.values()] == [6, 2] and all(s.object == "square" for s in parts["val"])
    assert ExpressionsConfig(root=str(tmp_path), **data).split_names(tmp_path) == ["train", "val"]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"caption": "both"}, r"annotation 0 has expression and caption: say which .* data\.expression"),
        ({"expression": 3}, r"annotation 0 has the impossible expression=3"),
        ({"image_id": 9}, "image_id=9, which .* lacks"),
        ({"segmentation": None}, "annotation 0 has the impossible segmentation=None"),
        ({"segmentation": "x"}, "annotation 0 has the impossible segmentation='x'"),
    ],
)
def test_faults_name_the_annotation(tmp_path, own, words):
    with pytest.raises(DataError, match=words) as caught:
        read(written(tmp_path, things(**own)))
    assert "\n" not in str(caught.value)


def test_a_file_that_speaks_of_nothing(tmp_path):
    with pytest.raises(DataError, match="no annotation has an expression .* name its key with data.expression"):
        read(written(tmp_path, things(1, expression="")))
