"""The data set of many hands' pictures: no concept is in two splits, whatever source it comes from."""

from itertools import combinations

import numpy as np
import pytest
import tiny_packages
from mitrain_demo import named

from mitrain.core.errors import PrepareError
from mitrain.core.files import cache_home
from mitrain.data.duplicates import fingerprint, near_pairs
from mitrain.data.formats.captions import read_captions
from mitrain.data.formats.labels import read_labels
from mitrain.data.formats.records import read_records
from mitrain.data.images import open_image

SPLITS = ("train", "val", "test", "test_food")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder, target = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("named")
    art = {f"assets/{0x1F400 + i:04x}-fe0f.webp": tiny_packages.drawing(3000 + i) for i in range(50)}
    fluent = tiny_packages.tgz(folder / "fluent.tgz", art)
    emoji, clipart = tiny_packages.emoji(folder), tiny_packages.clipart(folder)
    stamps, food = tiny_packages.stamps(folder), tiny_packages.food(folder)
    named.build([*emoji[:3], fluent, *clipart, *stamps, *food], target, 0)
    return target


def check(folder):
    """Everything that two splits share and must not."""
    parts = {split: read_labels(folder / f"{split}.jsonl") for split in SPLITS}
    for one, other in combinations(parts, 2):
        if (one, other) != ("test", "test_food"):  # both are held out
            assert not {s.object for s in parts[one]} & {s.object for s in parts[other]}
        names = [{s.answer for s in read_records(folder / f"questions_{split}.jsonl")} for split in (one, other)]
        assert other == "test_food" or not names[0] & names[1]
    prints = [
        np.stack([fingerprint(open_image(folder, image)) for image in sorted({s.inputs["image"] for s in parts[split]})])
        for split in ("train", "val", "test")
    ]
    assert not any(near_pairs(*pair) for pair in combinations(prints, 2))
    assert {s.labels for s in parts["val"] + parts["test"]} <= {s.labels for s in parts["train"]}
    return parts


def test_no_concept_and_no_picture_is_in_two_splits(built):
    parts = check(built)
    assert all(parts.values())
    assert {s.kind for s in parts["train"]} == {"google", "twitter", "fluent", "clipart", "stamps"}
    assert {s.kind for s in parts["test_food"]} == {"food"}


def test_a_test_picture_has_its_name_alone_and_a_training_picture_a_second_text(built):
    for split in ("val", "test", "test_food"):
        pairs = read_captions(built / f"{split}.jsonl")
        assert len({s.files for s in pairs}) == len(pairs)
    texts = {}
    for sample in read_captions(built / "train.jsonl"):
        texts.setdefault(sample.files, []).append(sample.text)
    assert max(map(len, texts.values())) == 2 and all(len(set(own)) == len(own) for own in texts.values())


def test_a_name_stands_among_names_of_other_concepts(built):
    rows = read_records(built / "questions_train.jsonl")
    concept = {row.answer: row.object for row in rows}
    assert all(row.answer in row.candidates and len(set(row.candidates)) == len(row.candidates) for row in rows)
    assert not [row.id for row in rows for name in set(row.candidates) - {row.answer} if concept[name] == row.object]
    others = {name for name in concept if concept[name] != rows[0].object}
    assert len(rows[0].candidates) == min(named.CANDIDATES, len(others) + 1)


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("Little Penguin", "penguin"), ("the apples 02", "apple"), ("woman: juggling", "person"),
        ("man juggling", "juggling"),
        ("bird with a hat", "bird hat"), ("12", "person"),
    ],
)  # fmt: skip
def test_concepts(name, concept):
    assert named.concept_of(name) == concept


def test_fewer_packages_are_refused(tmp_path):
    with pytest.raises(PrepareError, match=r"named-pictures is made from nine packages: leave --archive out"):
        named.build([tmp_path / "one.tgz"], tmp_path, 0)


@pytest.mark.real
def test_the_real_set_is_large_and_leaks_nothing():
    folder = cache_home() / "data" / "named-pictures-1-seed0"
    if not folder.is_dir():
        pytest.skip("mitrain data prepare named-pictures")
    parts = check(folder)
    assert len(parts["train"]) >= 8000 and len(parts["test"]) >= 1000
    assert all(len(row.candidates) == named.CANDIDATES for row in read_records(folder / "questions_test.jsonl"))
