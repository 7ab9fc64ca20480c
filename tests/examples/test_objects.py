"""The data set object-scenes: what is held out, and that every expression holds of its scene."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny_packages
from mitrain_demo import objects, phrases
from mitrain_demo.compose import Style, Thing, scene
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.data.formats.refcoco import image_folder, read_refer

FEW = {"train": 6, "val": 3, "testA": 3, "testB": 3}
COLOURS = {"brick": (200, 0, 0), "leaf": (0, 190, 0), "sky": (0, 0, 210), "coal": (5, 5, 5), "snow": (250, 250, 250)}
CATEGORIES = {"brick": "stone", "coal": "stone", "leaf": "plant", "snow": "stone"}
THINGS = [
    Thing(
        name,
        frozenset({name}),
        Image.new("RGBA", (60, 40), (*rgb, 255)),
        CATEGORIES.get(name, ""),
        (f"{name}y", "thing"),
    )
    for name, rgb in COLOURS.items()
]


def build(target: Path, archives: list[Path]) -> Path:
    target.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "SCENES", FEW)
        patch.setattr(objects, "SHARES", {"train": 0.5, "test": 0.5})
        objects.build(archives, target, 0)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("objects")
    archives = [*tiny_packages.stamps(folder), *tiny_packages.emoji(folder)]
    return build(folder / "one", archives), build(folder / "two", archives)


def test_it_is_made_alike_twice(built):
    files = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in built]
    assert files[0] == files[1] and len(files[0]) > 15


def test_names_are_held_out_whoever_drew_them(built):
    of = {split: read_refer(built[0], "refcoco", "text", split) for split in FEW}
    names = {split: {name for sample in samples for name in sample.present} for split, samples in of.items()}
    assert not names["train"] & (names["testA"] | names["testB"]) and names["testA"].isdisjoint(names["testB"])
    assert all(name.startswith("thing ") for name in names["testB"])  # emoji; of testA stamps
    assert not any(name.startswith("thing ") for name in names["testA"])


def test_references_are_pictures_of_their_own(built):
    folder = image_folder(built[0], "refcoco")
    scenes = {row["file_name"] for row in json.loads((built[0] / "refcoco/instances.json").read_text())["images"]}
    for part in ("reference", "reasoning"):
        for sample in read_refer(built[0], "refcoco", part, "train"):
            assert sample.inputs["reference"] not in scenes and (folder / sample.inputs["reference"]).exists()
            assert sample.mask().any() and not any(name in sample.expression for name in sample.present)
    assert not any("reference" in sample.inputs for sample in read_refer(built[0], "refcoco", "text", "train"))


def test_too_few_packages_and_things_are_told(tmp_path):
    with pytest.raises(PrepareError, match="made from four packages"):
        objects.build([tmp_path], tmp_path, 0)
    with pytest.raises(PrepareError, match="too few usable things for the split val"):
        objects.write_objects(tmp_path, {"val": THINGS[:3]}, {"val": 1}, Style(), 0)


@pytest.mark.parametrize("seed", range(25))
def test_expressions_hold(seed):
    _, shown = scene(THINGS, Style(), Random(seed))
    names, categories = [one.thing.name for one in shown], [one.thing.category for one in shown]
    for phrase in phrases.texts_alone(shown):
        (i,) = phrase.targets
        one, others = shown[i], [other for j, other in enumerate(shown) if j != i]
        away = [abs(np.subtract(one.centre, other.centre)) for other in others]
        truth = {
            "name": phrase.text == f"the {names[i]}" and names.count(names[i]) == 1,
            "place": phrase.text == one.expression and names.count(names[i]) == 2,
            "size": phrase.text == one.expression and names.count(names[i]) == 2,
            "category": phrase.text == f"the {categories[i]}" and categories.count(categories[i]) == 1,
            "category and place": categories.count(categories[i]) == 2 and phrase.text.startswith(f"the {categories[i]} "),
            "other": categories.count(categories[i]) == 2 and names[i] not in phrase.text,
            "odd": {categories.count(each) for each in categories} == {1, 3} and categories.count(categories[i]) == 1,
            "keyword": phrase.text == f"something about {names[i]}y",
            "extreme": min(gap[int(phrase.text.split()[1] in ("topmost", "bottommost"))] for gap in away) >= phrases.APART,
            "nearest": any(other.thing.name in phrase.text for other in others),
        }
        assert truth[phrase.kind], phrase


def test_every_kind_of_expression_comes_up():
    random, kinds = Random(0), set()
    for _ in range(80):
        kinds |= {phrase.kind for phrase in phrases.texts_alone(scene(THINGS, Style(), random)[1])}
    assert len(kinds) == 10


def test_kinds_are_picked_by_their_shares():
    balance = phrases.Balance({"b": 3.0})
    pool = [phrases.Phrase("x", kind, (0,)) for kind in "ab" for _ in range(4)]
    picked = [phrase.kind for _ in range(20) for phrase in balance.pick(pool, 4)]
    assert picked.count("b") == 60 and picked.count("a") == 20
