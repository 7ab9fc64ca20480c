"""mitrain_demo/food.py: what is asked about a photograph is what was measured of all foods that it shows."""

from pathlib import Path

import pytest
import tiny_packages
from mitrain_demo import food, questions, stamps
from mitrain_demo.npm import package_files
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.core.files import cache_home
from mitrain.data.formats.labels import read_labels
from mitrain.data.formats.records import read_records
from mitrain.data.formats.targets import read_targets

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("food")
    food.build(tiny_packages.food(tmp_path_factory.mktemp("packages")), target, 0)
    return target


@pytest.fixture(scope="module")
def asked(folder):
    """id → (split, question) of every question."""
    return {q.id: (split, q) for split in SPLITS for q in read_records(folder / f"questions_{split}.jsonl", None)}


def answer(asked, name: str) -> str:
    return asked[name][1].answer


def test_nutrients_are_asked_as_measured(asked):
    found = {kind: answer(asked, f"B901#{kind}") for kind in food.NUTRIENTS}
    assert found == {"protein": "yes", "fat": "no", "carbohydrate": "yes", "water": "no"}
    question = asked["B901#protein"][1]
    assert question.prompt == "Question: Do 100 g of this food hold more than 10 g of protein? Answer:"
    assert question.candidates == ("yes", "no") and question.kind == "protein"


def test_foods_of_one_photograph_are_asked_where_they_agree(asked, folder):
    assert answer(asked, "O901#fat") == "yes" and answer(asked, "O901#group") == "meat"
    assert not {"O901#protein", "O901#water", "O902#group", "D903#name"} & asked.keys()
    assert answer(asked, "O901#name") == "yak" and answer(asked, "D902#name") == "tall stalk"
    (yak,) = [
        s for split in SPLITS for s in read_targets(folder / f"{split}.jsonl", {"target": "protein"}) if s.id == "O901"
    ]
    assert yak.text == "Yak" and yak.target == 14.5


def test_a_colour_is_asked_where_the_name_tells_one(asked):
    assert answer(asked, "B901#colour") == "red"
    assert not {"E901#colour", "A000#colour"} & asked.keys()


def test_a_name_is_asked_among_other_foods_of_the_split(asked):
    for split, question in asked.values():
        if question.kind == "name":
            names = {q.answer for s, q in asked.values() if s == split and q.kind == "name"}
            assert question.answer in question.candidates and set(question.candidates) <= names
            assert split != "train" or len(question.candidates) == 10
    bean = asked["D901#name"][1]
    assert bean.candidates.count("bean") == 1


def test_one_name_and_one_species_are_one_group(tmp_path):
    photos = food.read_photos(tiny_packages.food(tmp_path))
    groups = dict(zip([photo.code for photo in photos], food.grouped(photos), strict=True))
    assert groups["B901"] == groups["D901"] == groups["D902"]
    assert len(set(groups.values())) == len(groups) - 2


def test_every_group_is_shared_out_and_rare_ones_are_left_out(folder):
    labels = {split: {s.labels[0] for s in read_labels(folder / f"{split}.jsonl")} for split in SPLITS}
    assert labels["test"] >= {"cereals", "greens", "fruits"} and labels["val"]
    ids = {s.id for split in SPLITS for s in read_labels(folder / f"{split}.jsonl")}
    assert len(ids) == 18 + 5 and "I901" not in ids


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a: [a[0]], "leave --archive out"),
        (lambda a: [a[1], a[0]], "no index.csv"),
        (lambda a: [a[0], tiny_packages.tgz(a[1], {"index.csv": b"code,name\nA001,Rice\n" * 30})], "unknown layout"),
        (lambda a: [a[0], tiny_packages.tgz(a[1], {"index.csv": b"food\n"})], "unknown layout .no code"),
        (lambda a: [tiny_packages.tgz(a[0], {}), a[1]], "hold 0 photographs"),
        (lambda a: [tiny_packages.tgz(a[0], {"assets/A000.jpeg": b"GIF89a"}), a[1]], "hold 1 photographs"),
    ],
)
def test_other_packages_are_refused(tmp_path, spoil, says):
    with pytest.raises(PrepareError, match=says) as caught:
        food.build(spoil(tiny_packages.food(tmp_path)), tmp_path / "out", 0)
    assert "\n" not in str(caught.value)


def test_a_photograph_that_is_none_is_refused():
    photo = food.Photo("A001", b"GIF89a", "Rice", "rice", "", "cereals", {})
    with pytest.raises(PrepareError, match=r"A001.jpeg is no readable JPEG"):
        food.print_of(photo)


def test_an_npm_package_is_bounded(tmp_path, monkeypatch):
    archive = tiny_packages.tgz(tmp_path / "a.tgz", {"a": b"12345", "b": b"12345", "c": b"1"})
    assert dict(package_files(archive, "ab".__contains__)) == {"a": b"12345", "b": b"12345"}
    for name, bound in (("MAX_FILE", 4), ("MAX_TOTAL", 9)):
        with monkeypatch.context() as patch:
            patch.setattr(f"mitrain_demo.npm.{name}", bound)
            with pytest.raises(PrepareError, match="is too large"):
                list(package_files(archive, "ab".__contains__))


@pytest.mark.real
def test_the_real_tables():
    folder = cache_home() / "data" / "food-1-seed0"
    if not folder.is_dir():
        pytest.skip("the real data are not prepared: mitrain data prepare food")
    questions = [q for split in SPLITS for q in read_records(folder / f"questions_{split}.jsonl")]
    found = {q.id: q.answer for q in questions}
    assert found["A001#protein"] == "yes" and found["A001#group"] == "cereals" and found["D016#name"] == "brinjal"
    assert found["O001#group"] == "meat" and "O002#group" not in found  # chops: shoulder's photograph
    assert len({q.inputs["image"] for q in questions}) == 433


# together with Tux Paint's stamps


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    packages, target = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("mixed")
    questions.build([*tiny_packages.stamps(packages), *tiny_packages.food(packages)], target, 0)
    return target


def test_questions_about_both_in_one_set(mixed):
    rows = {split: read_records(mixed / f"{split}.jsonl") for split in SPLITS}
    for split, found in rows.items():
        assert {"category", "group", "name", "yesno", "protein"} <= {q.kind for q in found}, split
        assert all((mixed / q.inputs["image"]).is_file() for q in found)
        assert {len(q.candidates) for q in found if q.kind == "name"} <= {2, 3, 4}
    objects = [{q.object for q in found} for found in rows.values()]
    assert not objects[0] & objects[1] and not objects[0] & objects[2] and not objects[1] & objects[2]


def test_a_stamp_and_a_food_of_one_kind_share_a_split(tmp_path):
    collection = stamps.read_stamps(tiny_packages.stamps(tmp_path)[0])
    photos = food.read_photos(tiny_packages.food(tmp_path))
    plum = [stamp.kind for stamp in collection.stamps].index("plum"), [photo.name for photo in photos].index("plum")
    for seed in range(8):
        pictures = [Image.new("RGB", (8, 8)) for _ in collection.stamps]
        splits = questions.together(collection, photos, pictures, seed)
        assert splits[plum[0]] == splits[len(pictures) + plum[1]]


def test_both_sets_are_needed(tmp_path):
    with pytest.raises(PrepareError, match="leave --archive out"):
        questions.build(tiny_packages.food(tmp_path), tmp_path, 0)
