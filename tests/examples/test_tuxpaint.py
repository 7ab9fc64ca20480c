"""The data set tuxpaint: names, splits without a shared object, balanced questions, deterministic files."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import tiny_deb
from mitrain_demo import stamps, tuxpaint
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.core.files import cache_home
from mitrain.data.formats.records import read_records
from mitrain.data.images import open_image

SPLITS = list(tuxpaint.SHARES)
PREPARED = cache_home() / "data" / "tuxpaint-2-seed0"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return tiny_deb.stamps_deb(tmp_path_factory.mktemp("deb") / "stamps.deb")


@pytest.fixture(scope="module")
def built(archive, tmp_path_factory) -> Path:
    return build(archive, tmp_path_factory.mktemp("built"), seed=0)


def build(archive: Path, target: Path, seed: int) -> Path:
    tuxpaint.build([archive], target, seed)
    return target


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A frog.", "frog"),
        ("A pair of cherries.", "cherries"),
        ("An inukshuk (or inuksuk), a landmark made of stones.", "inukshuk"),
        ("A “Granny Smith” apple.", "granny smith apple"),
        ("A knight’s helmet.", "knight's helmet"),
        ("Mercury—the planet closest to the Sun.", "mercury"),
        ("A very small pumpkin.", "pumpkin"),
        ("The tender carries water and coal for the engine.", "tender"),
        ("A hoverfly resembles a honeybee drone.", "hoverfly"),
        ("!", "some_file"),
    ],
)
def test_a_caption_becomes_a_name(caption, name):
    assert stamps.name_of("any/some_file.png", caption) == name


def test_variants_of_one_thing_are_of_one_kind():
    names = ["apple", "red apple", "apples", "magellanic penguin", "penguin", "cherries", "top hat", "glass", "iris"]
    kinds = stamps.kinds_of([*names, "blue fedora", "very old fedora"])
    assert kinds["red apple"] == kinds["apples"] == "apple"
    assert kinds["magellanic penguin"] == "penguin"
    assert kinds["blue fedora"] == kinds["very old fedora"] == "fedora"  # which is no name here
    assert (kinds["cherries"], kinds["top hat"], kinds["glass"], kinds["iris"]) == (
        "cherry",
        "top hat",
        "glass",
        "iris",
    )


def test_only_captioned_things_are_read(archive):
    found = stamps.read_stamps(archive)
    paths = {stamp.path for stamp in found.stamps}
    assert "animals/crow.png" in paths
    assert not paths & {"animals/crow_mirror.png", "symbols/a.png", "food/loaf.svg"}
    assert {stamp.category for stamp in found.stamps} == set(stamps.CATEGORIES)
    assert found.copyright == "License: GPL-2\n"
    crow = next(stamp for stamp in found.stamps if stamp.path == "animals/crow2.png")
    assert (crow.name, crow.kind, crow.cartoon) == ("black crow", "crow", False)
    assert crow.image.getchannel("A").getextrema()[1] == 255 and crow.image.width <= 64  # cropped to the shape


def test_an_archive_of_something_else_is_refused(tmp_path):
    with pytest.raises(PrepareError, match="no captioned stamps"):
        build(tiny_deb.deb(tmp_path / "p.deb", {"./usr/bin/x.png": b""}), tmp_path, 0)


def test_a_broken_stamp_is_named(tmp_path):
    files = tiny_deb.stamps_files() | {tiny_deb.STAMPS + "food/plum.png": b"\x89PNG\r\n\x1a\n torn"}
    with pytest.raises(PrepareError, match=r"food/plum\.png is no readable PNG"):
        build(tiny_deb.deb(tmp_path / "p.deb", files), tmp_path, 0)


def test_no_object_and_no_picture_is_in_two_splits(built, archive):
    kinds = stamps.kinds_of(stamp.name for stamp in stamps.read_stamps(archive).stamps)
    objects, images = {}, {}
    for split in SPLITS:
        for sample in read_records(built / f"{split}.jsonl"):
            assert objects.setdefault(kinds[sample.object], split) == split
            assert images.setdefault(sample.inputs["image"], split) == split
    assert Counter(images.values())["train"] > Counter(images.values())["test"] > 0


def test_every_category_is_in_every_split(built):
    for split in SPLITS:
        answers = {s.answer for s in read_records(built / f"{split}.jsonl") if s.kind == "category"}
        assert answers == {word for word, _ in stamps.CATEGORIES.values()}


def test_every_picture_has_its_questions_and_can_be_opened(built):
    for split in SPLITS:
        samples = read_records(built / f"{split}.jsonl")
        asked = Counter((sample.inputs["image"], sample.kind) for sample in samples)
        for image in {sample.inputs["image"] for sample in samples}:
            assert (asked[image, "category"], asked[image, "name"]) == (1, 1)
            picture = open_image(built, image)
            assert picture.width == picture.height
        assert all(sample.answer in sample.candidates for sample in samples)
        assert all(not sample.answer.startswith(" ") for sample in samples)


def test_names_are_asked_among_other_kinds_of_thing(built, archive):
    kinds = stamps.kinds_of(stamp.name for stamp in stamps.read_stamps(archive).stamps)
    for sample in read_records(built / "test.jsonl"):
        if sample.kind == "name":
            assert len(set(sample.candidates)) == len(sample.candidates) == 1 + tuxpaint.DISTRACTORS
            assert [kinds[name] for name in sample.candidates].count(kinds[sample.answer]) == 1


def test_short_captions_are_asked_among_those_of_other_kinds_of_thing(built, archive):
    collection = stamps.read_stamps(archive).stamps
    of = {tuxpaint.image_path(stamp): stamp for stamp in collection}
    kinds = {stamp.caption: stamp.kind for stamp in collection}
    asked = [s for split in SPLITS for s in read_records(built / f"{split}.jsonl") if s.kind == "caption"]
    assert {s.inputs["image"] for s in asked} == {
        image for image, stamp in of.items() if stamp.caption and len(stamp.caption.split()) <= tuxpaint.SHORT
    }
    for sample in asked:
        assert sample.answer == of[sample.inputs["image"]].caption
        assert [kinds[caption] for caption in sample.candidates].count(kinds[sample.answer]) == 1


def test_a_variant_of_the_right_thing_is_no_wrong_name():
    blank = Image.new("RGBA", (1, 1))
    shown = [
        stamps.Stamp(f"food/{n}.png", n, n.split()[-1], "food", False, blank) for n in ("red apple", "green apple", "leek")
    ]
    for seed in range(5):
        assert sorted(tuxpaint.name_question(shown[0], shown, Random(seed))["candidates"]) == ["leek", "red apple"]


@pytest.mark.parametrize("split", SPLITS)
def test_yes_and_no_are_balanced_and_the_question_alone_tells_nothing(built, split):
    samples = [sample for sample in read_records(built / f"{split}.jsonl") if sample.kind == "yesno"]
    by_answer = {a: Counter(s.prompt for s in samples if s.answer == a) for a in ("yes", "no")}
    assert by_answer["yes"] == by_answer["no"]
    truths = {(sample.inputs["image"], sample.prompt): sample.answer for sample in samples}
    assert len(truths) == len(samples)  # no picture is asked the same with both answers


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_splits(built, archive, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    again.mkdir()
    other.mkdir()
    assert digests(build(archive, again, 0)) == digests(built)
    build(archive, other, 1)
    assert len({frozenset(s.object for s in read_records(folder / "test.jsonl")) for folder in (built, other)}) == 2


def test_the_summary_counts_what_is_there(built):
    summary = json.loads((built / "summary.json").read_text())
    for split in SPLITS:
        samples = [s for s in read_records(built / f"{split}.jsonl") if s.kind == "category"]
        assert summary[split]["images"] == len(samples)
        counts = Counter(sample.answer for sample in samples)
        assert summary[split]["categories"] == dict(counts)
        assert summary[split]["majority_share"] == pytest.approx(max(counts.values()) / len(samples), abs=5e-5)


def test_light_things_are_put_on_slate():
    light, dark = (Image.new("RGBA", (40, 20), (shade,) * 3) for shade in (250, 20))
    assert tuxpaint.on_plain_ground(light).getpixel((0, 0)) == tuxpaint.SLATE
    assert tuxpaint.on_plain_ground(dark).getpixel((0, 0)) == tuxpaint.WHITE


def test_phrases_have_their_article():
    def phrase(name):
        return tuxpaint.name_phrase(stamps.Stamp("", name, name, "food", False, Image.new("RGBA", (1, 1))))

    assert [phrase(name) for name in ("owl", "crow", "grapes", "moon", "corn", "glass")] == [
        "an owl",
        "a crow",
        "grapes",
        "the moon",
        "corn",
        "a glass",
    ]


@pytest.mark.real
@pytest.mark.skipif(not PREPARED.is_dir(), reason="the real stamps are not prepared: mitrain data prepare tuxpaint")
def test_the_real_data_set_holds_what_is_promised():
    splits = {split: read_records(PREPARED / f"{split}.jsonl") for split in SPLITS}
    pictures = {split: {s.inputs["image"]: s for s in samples if s.kind == "category"} for split, samples in splits.items()}
    total = sum(map(len, pictures.values()))
    assert total > 500
    assert len(pictures["train"]) / total == pytest.approx(0.7, abs=0.05)
    assert len(pictures["test"]) / total == pytest.approx(0.2, abs=0.04)
    for samples in pictures.values():
        assert len({sample.answer for sample in samples.values()}) == len(stamps.CATEGORIES)
        majority = Counter(sample.answer for sample in samples.values()).most_common(1)[0][1]
        assert majority / len(samples) < 0.35
    pixels = {}
    for split, samples in pictures.items():
        for image in samples:
            key = hashlib.sha256(open_image(PREPARED, image).tobytes()).hexdigest()
            assert pixels.setdefault(key, split) == split
