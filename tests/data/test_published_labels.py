"""UPMC-Food101, MM-IMDB and SNLI-VE in their own files, with the traps that the published ones hold."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import read_or_refused

from mitrain.core.errors import DataError
from mitrain.data import released, sources
from mitrain.data.formats import food101, mmimdb, snli_ve

# UPMC-Food101

TITLES = "\n".join(
    [
        'apple_pie_0.jpg,"Apple pie, the ""best""",apple_pie',
        "apple_pie_12.jpg,Mom's pie, with cream, and more,apple_pie",
        "",
        "french_onion_soup_3.jpg,  Soup \t of onions ,french_onion_soup",
        "miso_soup_4.jpg,,miso_soup",
        "",
    ]
)


def food_folder(root, titles=TITLES, test="miso_soup_9.jpg,Miso,miso_soup\n"):
    (root / "texts").mkdir(parents=True)
    (root / "texts" / "train_titles.csv").write_text(titles)
    (root / "texts" / "test_titles.csv").write_text(test)
    return root


def test_food101_as_distributed(tmp_path, caplog):
    root = food_folder(tmp_path, TITLES + "tea_102.jpg,Tea,tea")
    assert [s.id for s in food101.read_food101(root, "val", val_share=1e-9)] == ["tea_102.jpg"]
    caplog.clear()
    found = food101.read_food101(root, "train", val_share=1e-9)
    assert [(s.inputs["image"], s.text, s.labels) for s in found] == [
        ("images/train/apple_pie/apple_pie_0.jpg", 'Apple pie, the "best"', ("apple_pie",)),
        ("images/train/apple_pie/apple_pie_12.jpg", "Mom's pie, with cream, and more", ("apple_pie",)),
        ("images/train/french_onion_soup/french_onion_soup_3.jpg", "Soup of onions", ("french_onion_soup",)),
    ]
    assert "left out 1 without a title" in caplog.text
    assert food101.read_food101(root, "test", 0.1)[0].inputs["image"] == "images/test/miso_soup/miso_soup_9.jpg"


def test_food101_takes_its_validation_from_training_by_name(tmp_path):
    lines = "".join(f"pie_{n}.jpg,a pie,pie\n" for n in range(400))
    root = food_folder(tmp_path, "image,title,class\n" + lines)
    parts = {split: {s.id for s in food101.read_food101(root, split, 0.1)} for split in ("train", "val")}
    assert not parts["train"] & parts["val"] and len(parts["train"] | parts["val"]) == 400
    assert 20 <= len(parts["val"]) <= 60  # binomial(400, 0.1): six standard deviations are 36
    (root / "texts" / "train_titles.csv").write_text("".join(f"pie_{n}.jpg,a pie,pie\n" for n in range(399, -1, -1)))
    assert {s.id for s in food101.read_food101(root, "val", 0.1)} == parts["val"]


TRICKY = {
    'cheese_plate_717-2.jpg,"Cheese, ""old"" wine",cheese_plate': 'Cheese, "old" wine',
    'ravioli_1.jpg,"Best" ravioli, ever,ravioli': '"Best" ravioli, ever',
    'ravioli_2.jpg,"A quote that is never closed,ravioli': '"A quote that is never closed',
    'ravioli_3.jpg,"Two\nlines, or,\n\nmore",ravioli': "Two lines, or, more",
    'ravioli_4.jpg,5" ravioli, "ravioli"': '5" ravioli',
    "ravioli_5.jpg," + "long " * 40_000 + ",ravioli": " ".join(["long"] * 40_000),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_food101_reads_names_and_titles_as_the_web_wrote_them(tmp_path, newline):
    text = "\ufeff" + newline.join([*TRICKY, ""]).replace("\n", newline if newline != "\r\n" else "\n")
    root = food_folder(tmp_path, test=text)
    found = food101.read_food101(root, "test", 0.1)
    assert [s.text for s in found] == list(TRICKY.values())
    assert found[0].inputs["image"] == "images/test/cheese_plate/cheese_plate_717-2.jpg" and found[0].labels == (
        "cheese_plate",
    )


def test_food101_holds_something_out_of_a_handful(tmp_path):
    root = food_folder(tmp_path, "".join(f"pie_{n}.jpg,a pie,pie\n" for n in range(3)))
    assert [len(food101.read_food101(root, split, 0.001)) for split in ("train", "val")] == [2, 1]
    with pytest.raises(DataError, match=r"test_titles\.csv:1: the label 'miso_soup' is no class"):
        food101.read_food101(root, "test", 0.1, known=("pie", "tea"))
    assert food101.read_food101(root, "test", 0.1, known=("miso_soup", "tea"))


def derived_folder(root, split=None, text=None, classes=None):
    split = split or {"train": ["a_pie_1.jpg", "a_pie_2.jpg"], "val": ["tea_1.jpg"], "test": ["tea_2.jpg"]}
    text = text or {"a_pie_1.jpg": "pie", "tea_1.jpg": ["tea", "more"], "tea_2.jpg": "green tea"}
    for name, value in (("split", split), ("text", text), ("class_idx", classes or {"a_pie": 0, "tea": 1})):
        (root / f"{name}.json").write_text(json.dumps(value))
    return root


def test_food101_in_the_derived_layout(tmp_path, caplog):
    root = derived_folder(tmp_path)
    (train,) = food101.read_food101(root, "train", 0.1)
    (val,), (test,) = (food101.read_food101(root, split, 0.1) for split in ("val", "test"))
    assert (train.labels, train.text) == (("a_pie",), "pie") and "left out 1 without a title" in caplog.text
    assert val.inputs["image"] == "images/train/tea/tea_1.jpg" and test.inputs["image"] == "images/test/tea/tea_2.jpg"
    assert val.text == "tea"


@pytest.mark.parametrize(
    ("titles", "match"),
    [
        ("apple_pie_0.jpg,pie,apple_pie\napple_pie_1.jpg,pie\n", r"csv:2: .*not end with the class 'apple_pie'"),
        ("apple_pie_0.jpg,pie,soup\n", r"csv:1: .*not end with the class 'apple_pie'"),
        ("apple_pie_0.jpg,pie,soup\napple_pie_1.jpg,a,apple_pie\n", r"csv:1: .*not end with the class 'apple_pie'"),
        ("apple_pie_0.jpg\tpie\tapple_pie\n", r"csv:1: .*is no image name"),
        ("apple_pie_0.jpg,pie,apple_pie\nnonsense,pie,x\n", r"train_titles\.csv:2: 'nonsense' is no image name"),
        ("../../etc_1.jpg,pie,../../etc\n", r"train_titles\.csv:1: .*is no image name"),
        ("apple_pie_0.jpg,p,apple_pie\napple_pie_0.jpg,q,apple_pie\n", r"train_titles\.csv:2: the id .* twice"),
        ("", "no sample with a title"),
    ],
)
def test_food101_refuses_broken_titles(tmp_path, titles, match):
    root = food_folder(tmp_path, titles)
    with pytest.raises(DataError, match=match) as caught:
        food101.read_food101(root, "train", 1e-9)
    assert "\n" not in str(caught.value)


def test_food101_refuses_other_faults(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        food101.read_food101(tmp_path, "train", 0.1)
    root = derived_folder(tmp_path, classes={"tea": 0})
    with pytest.raises(DataError, match="not in class_idx"):
        food101.read_food101(root, "train", 0.1)
    derived_folder(tmp_path, text={"a_pie_1.jpg": 3})
    with pytest.raises(DataError, match=r"text\.json: 'a_pie_1\.jpg' is a int"):
        food101.read_food101(root, "train", 0.1)
    with pytest.raises(DataError, match="no split 'dev'"):
        food101.read_food101(root, "dev", 0.1)


# MM-IMDB

FILMS = {
    "0107465": {"plot": ["Short.", "The longest plot of all."], "genres": ["Comedy", "Drama"]},
    "0000002": {"plot": ["A report."], "genres": ["News", "Drama"]},
    "0000003": {"plot": "A text alone.", "genres": ["Western"]},
    "0000004": {"plot": [], "genres": ["Drama"]},
    "0000005": {"plot": ["Late talk."], "genres": ["Talk-Show"]},
}


def film_folder(root, films=FILMS, folder="dataset", split=None):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, facts in films.items():
        (root / folder / f"{name}.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
    ids = list(films)
    (root / "split.json").write_text(json.dumps(split or {"train": ids[:4], "dev": ids[4:], "test": ids[:1]}))
    return root


def test_mmimdb_takes_the_longest_plot_and_leaves_rare_genres_out(tmp_path, caplog):
    found = mmimdb.read_mmimdb(film_folder(tmp_path), "train")
    assert [(s.id, s.text, s.labels) for s in found] == [
        ("0107465", "The longest plot of all.", ("Drama", "Comedy")),
        ("0000003", "A text alone.", ("Western",)),
    ]
    assert found[0].inputs["image"] == "dataset/0107465.jpeg"
    assert "1 of the genre News" in caplog.text and "1 without a plot" in caplog.text
    with pytest.raises(DataError, match="no usable film in the split 'val'"):
        mmimdb.read_mmimdb(tmp_path, "val")
    assert "1 of the genre Talk-Show" in caplog.text


def test_mmimdb_knows_genres_in_any_case_and_those_that_a_user_named(tmp_path):
    film = {"plot": ["A plot."], "genres": ["sci-fi ", "Film-noir"]}
    root = film_folder(tmp_path, {"0000001": film, "0000002": film})
    assert mmimdb.read_mmimdb(root, "train")[0].labels == ("Sci-Fi", "Film-Noir")
    with pytest.raises(DataError, match=r"split\.json: train 0: the label 'Sci-Fi' is no class"):
        mmimdb.read_mmimdb(root, "train", known=("Drama", "Film-Noir"))


def test_mmimdb_with_labels_and_images_apart_and_ids_as_numbers(tmp_path):
    film_folder(tmp_path, folder="labels", split={"train": [107465], "dev": [3], "test": []})
    (tmp_path / "images").mkdir()
    (film,) = mmimdb.read_mmimdb(tmp_path, "train")
    assert (film.id, film.inputs["image"]) == ("0107465", "images/0107465.jpeg")
    assert len(mmimdb.GENRES) == len(set(mmimdb.GENRES)) == 23


@pytest.mark.parametrize(
    ("films", "split", "match"),
    [
        ({"1": "{broken"}, None, r"dataset/1\.json. is not valid JSON"),
        ({"1": "[]"}, None, r"1\.json' holds a list"),
        ({"1": {"plot": ["x"], "genres": 3}}, None, r"1\.json': genres is no list of texts"),
        ({"1": {"plot": ["x"]}}, None, r"1\.json': genres is no list of texts"),
        ({"1": {"plot": [3], "genres": ["Drama"]}}, None, r"1\.json': plot is no list of texts"),
        (
            {"1": {"plot": ["x"], "genres": ["Drama"]}},
            {"train": ["../1"]},
            r"train 0 is '\.\./1', which is no film's id",
        ),
        ({"1": {"plot": ["x"], "genres": ["Drama"]}}, {"train": "1"}, r"no list 'train'"),
        ({"1": {"plot": ["x"], "genres": ["Drama"]}}, {"train": ["2"]}, r"cannot read '.*2\.json'"),
        ({"1": {"plot": ["x"], "genres": ["Drama"]}}, {"train": ["1", "1"]}, r"train 1: the id '1' stands twice"),
    ],
)
def test_mmimdb_refuses_broken_files(tmp_path, films, split, match):
    root = film_folder(tmp_path, films, split=split)
    with pytest.raises(DataError, match=match) as caught:
        mmimdb.read_mmimdb(root, "train")
    assert "\n" not in str(caught.value)


def test_mmimdb_names_a_folder_that_is_missing(tmp_path):
    (tmp_path / "split.json").write_text('{"train": ["1"]}')
    with pytest.raises(DataError, match="no folder dataset or labels"):
        mmimdb.read_mmimdb(tmp_path, "train")


# SNLI-VE

PAIR = {
    "annotator_labels": ["neutral", "entailment"], "captionID": "4705552913.jpg#2", "gold_label": "neutral",
    "pairID": "4705552913.jpg#2r1n", "sentence1": "Two women embrace.", "sentence2": "The sisters are hugging.",
}  # fmt: skip


def pair_file(root, *rows, split="train"):
    (root / "flickr30k_images").mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (root / f"snli_ve_{split}.jsonl").write_text(text)
    return root


@pytest.mark.parametrize(
    "picture",
    [
        {"Flikr30kID": "4705552913.jpg"},
        {"Flikr30kID": "4705552913"},
        {"Flickr30kID": "4705552913.jpg"},
        {"Flickr30K_ID": "4705552913"},
        {"Flickr30K_ID": 4705552913},
        {"flickr30k_id": "4705552913"},
        {"Flikr30K_ID": "4705552913.jpg"},
        {"Flickr30K_ID": ""},
        {},
    ],
)
def test_snli_ve_knows_every_spelling_of_the_pictures_name(tmp_path, picture):
    pair = PAIR | picture | ({"pairID": "without a picture"} if any(picture.values()) else {})
    (found,) = snli_ve.read_snli_ve(pair_file(tmp_path, pair), "train")
    assert found.inputs["image"] == "flickr30k_images/4705552913.jpg" and found.object == "4705552913.jpg"
    assert (found.id, found.text, found.labels) == (pair["pairID"], "The sisters are hugging.", ("neutral",))


def test_snli_ve_leaves_undecided_pairs_out_and_reads_dev_as_val(tmp_path, caplog):
    rows = [PAIR, PAIR | {"pairID": "1.jpg#0r1e", "gold_label": "-"}, PAIR | {"pairID": "2.jpg#0r1e"}]
    found = snli_ve.read_snli_ve(pair_file(tmp_path, *rows, split="dev"), "val")
    assert [s.object for s in found] == ["4705552913.jpg", "2.jpg"]
    assert "left out 1 without a majority" in caplog.text


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([PAIR, "{broken"], r"train\.jsonl:2: not valid JSON"),
        ([PAIR | {"gold_label": "entailed"}], r"train\.jsonl:1: the label 'entailed' is no class"),
        ([PAIR | {"gold_label": None}], r"train\.jsonl:1: no 'gold_label'"),
        ([PAIR | {"sentence2": " "}], r"train\.jsonl:1: no 'sentence2'"),
        ([PAIR | {"pairID": "no picture"}], r"train\.jsonl:1: no Flikr30kID"),
        ([{k: v for k, v in PAIR.items() if k != "pairID"}], r"train\.jsonl:1: no Flikr30kID.* no picture in pairID"),
        ([PAIR | {"Flikr30kID": ["1.jpg"]}], r"train\.jsonl:1: 'Flikr30kID' is a list"),
        ([PAIR, PAIR], r"train\.jsonl:2: the id .* twice"),
        ([PAIR | {"gold_label": "-"}], "no decided pair"),
    ],
)
def test_snli_ve_refuses_broken_files(tmp_path, rows, match):
    with pytest.raises(DataError, match=match) as caught:
        snli_ve.read_snli_ve(pair_file(tmp_path, *rows), "train")
    assert "\n" not in str(caught.value)


def test_snli_ve_names_a_folder_that_is_missing(tmp_path):
    pair_file(tmp_path, PAIR)
    with pytest.raises(DataError, match="no picture folder pictures"):
        snli_ve.read_snli_ve(tmp_path, "train", "pictures")
    with pytest.raises(DataError, match="cannot read"):
        snli_ve.read_snli_ve(tmp_path, "test")


def test_the_splits_are_those_that_the_files_have(tmp_path):
    def names(section: type[sources.DataSection]) -> list[str]:
        return section(root=str(tmp_path)).split_names(tmp_path)

    film_folder(tmp_path, split={"train": ["0107465"], "test": ["0000003"]})
    assert names(released.MmimdbConfig) == ["train", "test"]
    pair_file(tmp_path, PAIR, split="dev")
    assert names(released.SnliVeConfig) == ["val"]
    images = [{"filename": "1.jpg", "split": split, "sentences": [{"raw": "One."}]} for split in ("restval", "test")]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    assert names(released.KarpathyConfig) == ["train", "test"]


# all of them

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), noise=st.binary(max_size=8))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, data, noise):
    root = tmp_path_factory.mktemp("fuzz")
    pair = data.draw(st.dictionaries(st.sampled_from([*PAIR, "Flikr30kID", "Flickr30K_ID"]), VALUES))
    pair_file(root, PAIR, data.draw(st.sampled_from([{}, PAIR])) | pair)
    film = data.draw(st.dictionaries(st.sampled_from(["plot", "genres"]), VALUES))
    film_folder(root, {"1": film}, split=data.draw(st.sampled_from([None, {"train": data.draw(VALUES)}])))
    cells = data.draw(st.lists(st.text(max_size=6) | st.sampled_from(["pie_1.jpg", "pie"]), max_size=4))
    food_folder(root, ",".join(cells))
    for path in (root / "snli_ve_train.jsonl", root / "texts" / "train_titles.csv"):
        path.write_bytes(path.read_bytes() + noise)
    for read in (
        lambda: snli_ve.read_snli_ve(root, "train"),
        lambda: mmimdb.read_mmimdb(root, "train"),
        lambda: food101.read_food101(root, "train", 0.1),
    ):
        samples = read_or_refused(read, DataError)
        assert samples is None or all(s.labels and s.inputs["image"] and "/../" not in s.inputs["image"] for s in samples)


@settings(max_examples=30, deadline=None)
@given(split=VALUES, text=VALUES, classes=VALUES)
def test_any_derived_layout_is_read_or_refused(tmp_path_factory, split, text, classes):
    root = tmp_path_factory.mktemp("fuzz")
    for name, value in (("split", {"train": split}), ("text", text), ("class_idx", classes)):
        (root / f"{name}.json").write_text(json.dumps(value))
    samples = read_or_refused(lambda: food101.read_food101(root, "train", 0.1), DataError)
    assert samples is None or all(s.labels and s.text for s in samples)
