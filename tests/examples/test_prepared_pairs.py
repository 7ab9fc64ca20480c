"""Prepared pictures with texts: what two splits must not share, labels that mean something, deterministic files."""

import hashlib
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny_deb
import tiny_packages
from mitrain_demo import captions, emoji, entailment, food, openclipart, stamps
from mitrain_demo.splits import split_groups
from PIL import Image, ImageDraw

from mitrain.core.errors import PrepareError
from mitrain.core.files import cache_home
from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain.data.formats.captions import read_captions, read_karpathy
from mitrain.data.formats.labels import read_labels
from mitrain.data.formats.snli_ve import read_snli_ve
from mitrain.data.images import open_image

SETS = {
    "tuxpaint-captions": (captions, tiny_packages.stamps),
    "openclipart": (openclipart, tiny_packages.clipart),
    "emoji": (emoji, tiny_packages.emoji),
    "food": (food, tiny_packages.food),
}
REAL = pytest.mark.real


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Each set made of tiny packages, once."""
    made: dict[str, tuple[Path, list[Path]]] = {}

    def build(name: str) -> tuple[Path, list[Path]]:
        if name not in made:
            module, packages = SETS[name]
            archives, target = packages(tmp_path_factory.mktemp("packages")), tmp_path_factory.mktemp(name)
            module.build(archives, target, 0)
            made[name] = (target, archives)
        return made[name]

    return build


def rows_of(folder: Path, multilabel: bool) -> dict[str, list]:
    files = sorted(file for file in folder.glob("*.jsonl") if not file.stem.startswith("questions"))
    return {file.stem: read_labels(file, multilabel=multilabel) for file in files}


def shared(folder: Path, splits: dict[str, list]) -> list[str]:
    """Everything that two splits share and must not."""
    found = []
    prints = {
        split: np.stack([fingerprint(open_image(folder, image)) for image in sorted({s.inputs["image"] for s in samples})])
        for split, samples in splits.items()
    }
    for one, other in combinations(splits, 2):
        for what in ("id", "files", "object", "text"):
            both = {getattr(s, what) for s in splits[one]} & {getattr(s, what) for s in splits[other]}
            found += [f"{one} and {other} share the {what} {value!r}" for value in sorted(both)]
        near = near_pairs(prints[one], prints[other])
        found += [f"{one} and {other} share {len(near)} near-duplicates"] if near else []
    return found


@pytest.mark.parametrize("name", SETS)
def test_splits_share_no_object_no_text_and_no_picture(built, name):
    folder, _ = built(name)
    splits = rows_of(folder, name == "openclipart")
    known = splits.pop("test_vendor", [])
    assert set(splits) == {"train", "val", "test"} and all(splits.values())
    assert shared(folder, splits) == []
    if known:  # the held-out vendor's drawings of known things are no near-duplicates of what training shows
        pictures = [
            np.stack([fingerprint(open_image(folder, s.inputs["image"])) for s in p]) for p in (splits["train"], known)
        ]
        assert near_pairs(*pictures) == [] and {s.text for s in known} <= {s.text for s in splits["train"]}


@pytest.mark.parametrize("name", SETS)
def test_both_layouts_say_the_same(built, name):
    folder, _ = built(name)
    for split in ("train", "val", "test"):
        rows = read_captions(folder / f"{split}.jsonl")
        pairs = read_karpathy(folder, None, split)
        assert Counter((s.inputs["image"], s.text, s.object) for s in pairs) == Counter(
            (s.inputs["image"], s.text, s.object) for s in rows
        )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train"]["samples"] == len(read_captions(folder / "train.jsonl"))


@pytest.mark.parametrize("name", SETS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_splits(built, name, tmp_path):
    folder, archives = built(name)
    module, _ = SETS[name]
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        module.build(archives, tmp_path / str(seed), seed)
    digests = [
        {str(p.relative_to(f)): hashlib.sha256(p.read_bytes()).digest() for p in f.rglob("*") if p.is_file()}
        for f in (folder, tmp_path / "0")
    ]
    assert digests[0] == digests[1]
    assert (tmp_path / "1" / "test.jsonl").read_bytes() != (folder / "test.jsonl").read_bytes()


def test_variants_of_a_drawing_stay_together(built):
    folder, _ = built("openclipart")
    samples = {s.id: s for split in rows_of(folder, True).values() for s in split}
    twins = ["animals/twin_01", "animals/other", "animals/twin_02", "food/late"]
    assert len({samples[name].object for name in twins}) == 1
    assert samples["animals/other"].labels == ("animal", "food")
    assert samples["animals/animaldx".replace("dx", "d0x")].text == "animal & daa"  # the packed one, its entities resolved
    assert not {"computer/icon", "animals/untitled", "animals/animalaax"} & set(samples)
    assert {label for s in samples.values() for label in s.labels} == {"animal", "food", "people"}


def test_one_vendor_is_never_trained_on(built):
    folder, _ = built("emoji")
    splits = rows_of(folder, False)
    vendors = {split: {s.id.partition("/")[0] for s in samples} for split, samples in splits.items()}
    assert vendors == {"train": {"google"}, "val": {"google"}, "test": {"twitter"}, "test_vendor": {"twitter"}}
    assert not {label for samples in splits.values() for s in samples for label in s.labels} - set(emoji.CATEGORIES.values())
    alike = {f"twitter/{0x1F400 + i:x}-fe0f" for i in range(3)}
    assert not alike & {s.id for s in splits["test_vendor"]}
    both = [split for split, samples in splits.items() if any("juggling" in s.text for s in samples)]
    assert sorted(both) in (["test"], ["val"], ["test_vendor", "train"])


@pytest.mark.parametrize("module", [openclipart, emoji])
def test_packages_of_something_else_are_refused(tmp_path, module):
    with pytest.raises(PrepareError, match="leave --archive out"):
        module.build([tmp_path / "one"], tmp_path, 0)
    other = [tiny_deb.deb(tmp_path / f"{i}.deb", {"./usr/x": b""}) for i in range(2 if module is openclipart else 3)]
    with pytest.raises(PrepareError) as caught:
        module.build(other, tmp_path, 0)
    assert "\n" not in str(caught.value)


def test_a_torn_emoji_package_is_refused(tmp_path):
    archives = tiny_packages.emoji(tmp_path)
    archives[1].write_bytes(archives[1].read_bytes()[:-200])
    with pytest.raises(PrepareError, match=r"twitter\.tgz.*not the whole package"):
        emoji.build(archives, tmp_path / "out", 0)


# entailment


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("entailment")
    entailment.build(tiny_packages.stamps(tmp_path_factory.mktemp("packages")), target, 0)
    return target


def test_entailment_is_in_snli_ves_own_format(pairs_folder):
    splits = {split: read_snli_ve(pairs_folder, split) for split in ("train", "val", "test")}
    for samples in splits.values():
        counts = Counter(s.labels[0] for s in samples)
        assert counts["entailment"] == counts["neutral"] >= counts["contradiction"] > 0
        for image in {s.inputs["image"] for s in samples}:
            open_image(pairs_folder, image)
    objects = [{s.object for s in samples} for samples in splits.values()]
    assert not objects[0] & objects[1] and not objects[0] & objects[2] and not objects[1] & objects[2]


def test_labels_follow_from_name_and_category(pairs_folder, tmp_path):
    found = stamps.read_stamps(tiny_packages.stamps(tmp_path)[0]).stamps
    by_file = {entailment.file_name(s): s for s in found}
    for sample in read_snli_ve(pairs_folder, "train"):
        stamp = by_file[sample.object]
        true = any(
            f"shows {phrase}" in sample.text for phrase in (entailment.name_phrase(stamp), entailment.category_phrase(stamp))
        )
        plain = sample.text.endswith(
            tuple(f"{w}." for w in (entailment.name_phrase(stamp), entailment.category_phrase(stamp)))
        )
        assert {"entailment": true and plain, "neutral": true and not plain, "contradiction": not true}[sample.labels[0]]


def test_a_text_alone_tells_at_most_what_is_not_entailed(pairs_folder):
    samples = read_snli_ve(pairs_folder, "train")
    ends = tuple(text.partition("{}")[2] for text in entailment.CIRCUMSTANCES)
    with_circumstance = [s for s in samples if s.text.endswith(ends)]
    labels = Counter(s.labels[0] for s in with_circumstance)
    assert labels["entailment"] == 0 and labels["contradiction"] > 0
    plain = Counter(s.labels[0] for s in samples if s not in with_circumstance)
    assert plain["neutral"] == 0 and plain["contradiction"] > 0


# near-duplicates and groups


def picture(seed: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    random = np.random.default_rng(seed)
    for _ in range(5):
        x, y, w, h = random.integers(0, 40, 2).tolist() + random.integers(8, 24, 2).tolist()
        draw.rectangle((x, y, x + w, y + h), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def test_near_duplicates_are_scaled_mirrored_or_touched_up():
    base = picture(0)
    touched = base.copy()
    ImageDraw.Draw(touched).rectangle((0, 0, 2, 2), fill="grey")
    alike = [base, base.resize((200, 150)), base.transpose(Image.Transpose.FLIP_LEFT_RIGHT), touched]
    prints = np.stack([fingerprint(image) for image in [*alike, *map(picture, range(1, 30))]])
    assert near_pairs(prints) == list(combinations(range(4), 2))
    blank = np.stack([fingerprint(Image.new("RGB", (9, 9), shade)) for shade in ("white", "black")])
    assert near_pairs(blank) == []  # plain pictures say nothing


def test_groups_join_over_pairs_and_keys():
    assert merged(6, [(0, 1), (1, 2)], ["", "", "a", "a", "", ""], [1, 2, 3, 4, 5, 5]) == [0, 0, 0, 0, 4, 4]


def test_groups_are_split_whole_and_by_their_shares():
    groups = [i // 3 for i in range(300)]
    found = split_groups(groups, "seed")
    assert all(len({s for s, g in zip(found, groups, strict=True) if g == group}) == 1 for group in set(groups))
    counts = Counter(found)
    assert counts == {"train": 210, "val": 30, "test": 60} and found != split_groups(groups, "other")


# the real ones, where they are prepared


@REAL
@pytest.mark.parametrize("name", SETS)
def test_real_splits_share_nothing(name):
    folder = cache_home() / "data" / f"{name}-1-seed0"
    if not folder.is_dir():
        pytest.skip(f"the real data are not prepared: mitrain data prepare {name}")
    splits = rows_of(folder, name == "openclipart")
    splits.pop("test_vendor", None)
    assert shared(folder, splits) == [] and sum(map(len, splits.values())) > 400
