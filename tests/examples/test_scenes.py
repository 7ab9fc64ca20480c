"""Composed scenes: exact masks, expressions that hold, held-out objects, and files that our reader reads."""

import hashlib
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny_deb
from mitrain_demo import compose, refcoco_files, scenes
from mitrain_demo.backgrounds import background, clouds, gradient, pattern, plain
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.core.files import cache_home
from mitrain.data.formats.refcoco import image_folder, read_refer, split_names
from mitrain.data.images import open_image

FEW = {"train": 12, "val": 4, "testA": 4, "testB": 4}
PREPARED = cache_home() / "data" / "tuxpaint-scenes-1-seed0"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return tiny_deb.stamps_deb(tmp_path_factory.mktemp("deb") / "stamps.deb")


def build(archive: Path, target: Path, seed: int) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", FEW)
        scenes.build([archive], target, seed)
    return target


@pytest.fixture(scope="module")
def built(archive, tmp_path_factory) -> Path:
    return build(archive, tmp_path_factory.mktemp("built"), seed=0)


def thing(name: str, colour: tuple[int, int, int], size: tuple[int, int] = (60, 40)) -> compose.Thing:
    return compose.Thing(name, frozenset({name}), Image.new("RGBA", size, (*colour, 255)))


COLOURS = {"brick": (200, 0, 0), "leaf": (0, 190, 0), "sky": (0, 0, 210), "coal": (5, 5, 5), "snow": (250, 250, 250)}
THINGS = [thing(name, colour) for name, colour in COLOURS.items()]


@pytest.mark.parametrize("seed", range(30))
def test_expressions_hold_and_masks_are_exact(seed):
    style = compose.Style()
    picture, shown = compose.scene(THINGS, style, Random(seed))
    pixels = np.asarray(picture).astype(int)
    assert 2 < len(shown) < 5
    assert sum(one.mask.astype(int) for one in shown).max() == 1  # no pixel belongs to two objects
    for one in shown:
        assert (np.abs(pixels[one.mask] - COLOURS[one.thing.name]).max(0) <= 1).all()
        assert one.mask.sum() >= style.visible * one.solid.sum()
        twins = [other for other in shown if other.thing is one.thing and other is not one]
        if not twins:
            assert one.expression == f"the {one.thing.name}" and one.kind == "name"
            continue
        (twin,) = twins
        (x, y), (other_x, other_y) = one.centre, twin.centre
        truth = {
            f"the {one.thing.name} on the left": x <= other_x - style.gap,
            f"the {one.thing.name} on the right": x >= other_x + style.gap,
            f"the top {one.thing.name}": y <= other_y - style.gap,
            f"the bottom {one.thing.name}": y >= other_y + style.gap,
            f"the bigger {one.thing.name}": one.solid.sum() > 1.5 * twin.solid.sum(),
            f"the smaller {one.thing.name}": 1.5 * one.solid.sum() < twin.solid.sum(),
        }
        assert truth[one.expression]
    assert len({one.expression for one in shown}) == len(shown)


def test_things_of_one_family_never_meet():
    related = [compose.Thing(t.name, frozenset({"same"}), t.image) for t in THINGS[:2]] + THINGS[2:]
    for seed in range(20):
        _, shown = compose.scene(related, compose.Style(), Random(seed))
        assert not {"brick", "leaf"} <= {one.thing.name for one in shown}


def test_every_layout_and_relation_comes_up():
    random = Random(0)
    kinds = [one.kind for _ in range(60) for one in compose.scene(THINGS, compose.Style(), random)[1]]
    assert set(kinds) == {"name", *compose.TEMPLATES}
    assert 0.45 < kinds.count("name") / len(kinds) < 0.7


@pytest.mark.parametrize("draw", [plain, gradient, clouds, pattern])
def test_backgrounds_are_blends_between_nought_and_one(draw):
    for seed in range(8):
        blend = draw(50, Random(seed))
        assert blend.shape == (50, 50) and blend.min() >= 0 and blend.max() <= 1


def test_backgrounds_vary():
    grounds = {background(32, Random(seed)).tobytes() for seed in range(20)}
    assert len(grounds) == 20


@pytest.mark.parametrize("flat", ["0000", "1111", "0110", "1001", "1000", "0001"])
def test_run_lengths_of_every_small_mask(flat):
    mask = np.array([c == "1" for c in flat]).reshape(2, 2)
    runs = refcoco_files.run_lengths(mask)
    columns = "".join(str(i % 2) * count for i, count in enumerate(runs["counts"]))
    assert columns == "".join("01"[int(value)] for value in mask.ravel(order="F"))
    assert runs["size"] == [2, 2]


def test_our_reader_reads_what_was_written(built):
    assert sorted(split_names(built, "refcoco")) == sorted(FEW)
    folder = image_folder(built, "refcoco")
    table = json.loads((built / "refcoco" / "instances.json").read_text())
    by_id = {annotation["id"]: annotation for annotation in table["annotations"]}
    for split, count in FEW.items():
        samples = read_refer(built, "refcoco", None, split)
        assert len({sample.inputs["image"] for sample in samples}) == count
        for sample in samples:
            annotation = by_id[int(sample.id.split("/")[1])]
            mask, (x, y, width, height) = sample.mask(), annotation["bbox"]
            assert open_image(folder, sample.inputs["image"]).size == mask.shape[::-1] == (224, 224)
            assert mask.sum() == annotation["area"] == mask[y : y + height, x : x + width].sum()
            assert mask[y].any() and mask[y + height - 1].any() and mask[:, x].any() and mask[:, x + width - 1].any()
            assert sample.object in sample.expression


def test_held_out_objects_and_cartoons_are_never_trained_on(built, archive):
    objects = {split: {s.object for s in read_refer(built, "refcoco", None, split)} for split in FEW}
    stamps = scenes.read_stamps(archive).stamps
    things, splits = scenes.share_things(stamps, 0), scenes.split_kinds(stamps, 0)
    split_of = {stamp.name: splits[stamp.kind] for stamp in stamps}
    assert {split_of[t.name] for t in things["train"]} == {"train"}
    assert {split_of[t.name] for t in things["testA"]} == {"val", "test"}  # of tuxpaint, with the same seed
    assert not {t.name for t in things["train"]} & {t.name for t in things["testA"]}
    assert objects["train"] <= {t.name for t in things["train"]} and objects["testA"] <= {t.name for t in things["testA"]}
    cartoons = {stamp.image.tobytes() for stamp in stamps if stamp.cartoon}
    assert len(things["testB"]) == len(cartoons)
    assert not cartoons & {t.image.tobytes() for split in ("train", "testA") for t in things[split]}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(built, archive, tmp_path):
    def digests(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    again, other = tmp_path / "again", tmp_path / "other"
    again.mkdir()
    other.mkdir()
    assert digests(build(archive, again, 0)) == digests(built)
    assert digests(build(archive, other, 1))["refcoco/instances.json"] != digests(built)["refcoco/instances.json"]


def test_too_few_stamps_are_refused(tmp_path):
    kept = {name: data for name, data in tiny_deb.stamps_files().items() if "cartoon" not in name}
    with pytest.raises(PrepareError, match="too few usable stamps for the split testB"):
        build(tiny_deb.deb(tmp_path / "p.deb", kept), tmp_path, 0)


def test_thin_soft_and_tiny_stamps_are_no_targets(archive):
    stamp = scenes.read_stamps(archive).stamps[0]

    def altered(image):
        return scenes.is_target(type(stamp)(stamp.path, stamp.name, stamp.kind, stamp.category, False, image))

    square = Image.new("RGBA", (80, 80), (9, 9, 9, 255))
    thin, soft = square.resize((80, 8)), Image.new("RGBA", (80, 80), (9, 9, 9, 60))
    soft.paste(square.resize((80, 30)), (0, 0))
    assert [altered(image) for image in (square, thin, soft, square.resize((30, 30)))] == [True, False, False, False]


@pytest.mark.real
@pytest.mark.skipif(not PREPARED.is_dir(), reason="the real scenes are not prepared: mitrain data prepare tuxpaint-scenes")
def test_the_real_scenes_hold_what_is_promised():
    splits = {split: read_refer(PREPARED, "refcoco", "unc", split) for split in scenes.SCENES}
    for split, count in scenes.SCENES.items():
        assert len({sample.inputs["image"] for sample in splits[split]}) == count
    texts = {sample.expression for samples in splits.values() for sample in samples}
    assert len(texts) <= 2000
    train, unseen = ({s.object for s in splits[split]} for split in ("train", "testA"))
    assert not train & unseen and {s.object for s in splits["val"]} <= train
    names = sum(sample.kind == "name" for sample in splits["train"]) / len(splits["train"])
    assert 0.5 < names < 0.65
    areas = [sample.mask().mean() for sample in splits["val"]]
    assert np.mean(areas) > 0.06 and min(areas) > 0.01
