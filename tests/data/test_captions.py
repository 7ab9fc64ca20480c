"""Captions: Karpathy's JSON with its traps, and JSONL or CSV of one's own."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import read_or_refused

from mitrain.core.errors import DataError
from mitrain.data.formats.captions import CaptionSample, read_captions, read_karpathy


def image(name, split, *captions, **more):
    sentences = [{"raw": c, "tokens": c.lower().split(), "sentid": i} for i, c in enumerate(captions)]
    return {"filename": name, "split": split, "sentences": sentences, **more}


def write(root, images, name="dataset_coco.json", folder="images"):
    (root / name).write_text(json.dumps({"dataset": "coco", "images": images}))
    for entry in images:
        if isinstance(entry, dict) and isinstance(entry.get("filename"), str):
            path = root / folder / str(entry.get("filepath", "")) / entry["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


COCO = [
    image("a.jpg", "train", "A cat.", "A black  cat.\n", filepath="train2014", cocoid=1),
    image("b.jpg", "restval", "A dog.", filepath="val2014"),
    image("c.jpg", "val", "A hen.", " ", filepath="val2014"),
    image("d.jpg", "test", "A cow.", "Cows.", filepath="val2014"),
]


def test_restval_is_training_and_filepath_is_a_folder(tmp_path, caplog):
    root = write(tmp_path, COCO)
    train = read_karpathy(root, None, "train")
    assert [(s.inputs["image"], s.text) for s in train] == [
        ("images/train2014/a.jpg", "A cat."),
        ("images/train2014/a.jpg", "A black cat."),
        ("images/val2014/b.jpg", "A dog."),
    ]
    assert len({s.id for s in train}) == 3 and len(read_karpathy(root, "dataset_coco.json", "test")) == 2
    assert [s.text for s in read_karpathy(root, None, "val")] == ["A hen."]
    assert "left out 1 wordless captions" in caplog.text


def test_flickr_has_no_filepath_and_perhaps_tokens_alone(tmp_path, caplog):
    bare = {"filename": "2.jpg", "split": "train", "sentences": [{"tokens": ["a", "red", "kite"]}]}
    images = [image("1.jpg", "train", "One."), bare, image("3.jpg", "train")]
    root = write(tmp_path, images, "dataset_flickr30k.json", "flickr30k_images")
    found = read_karpathy(root, None, "train")
    assert [(s.inputs["image"], s.text) for s in found] == [
        ("flickr30k_images/1.jpg", "One."),
        ("flickr30k_images/2.jpg", "a red kite"),
    ]
    assert "left out 1 images without a caption" in caplog.text
    elsewhere = write(tmp_path / "x", images, folder="pictures") if (tmp_path / "x").mkdir() is None else None
    assert read_karpathy(elsewhere, None, "train", "pictures")[0].inputs["image"] == "pictures/1.jpg"
    with pytest.raises(DataError, match=r"no file '1\.jpg' .*data\.images"):
        read_karpathy(elsewhere, None, "train")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ("x", r"coco\.json: image 1 is 'x' instead of a dictionary"),
        ({"split": "train", "sentences": []}, r"image 1 has no 'filename'"),
        (image("", "train", "x"), r"image 1 has no 'filename'"),
        (image("b.jpg", "dev", "x"), r"image 1 has the unknown split 'dev'"),
        (image("b.jpg", ["train"], "x"), r"image 1 has the impossible split"),
        ({"filename": "b.jpg", "split": "train"}, r"image 1 has no 'sentences'"),
        ({"filename": "b.jpg", "split": "train", "sentences": ["x"]}, r"image 1, sentence 0 is 'x' instead"),
        ({"filename": "b.jpg", "split": "train", "sentences": [{}]}, r"sentence 0 has no 'raw'"),
        ({"filename": "b.jpg", "split": "train", "sentences": [{"raw": 3}]}, r"sentence 0 has the impossible raw"),
        (image("b.jpg", "train", "x", filepath=3), r"image 1 has the impossible filepath=3"),
    ],
)
def test_karpathy_refuses_broken_files(tmp_path, entry, match):
    root = write(tmp_path, [COCO[0], entry])
    with pytest.raises(DataError, match=match) as caught:
        read_karpathy(root, None, "train")
    assert "\n" not in str(caught.value)


def test_karpathy_refuses_other_faults(tmp_path):
    with pytest.raises(DataError, match=r"0 files dataset\*\.json"):
        read_karpathy(tmp_path, None, "train")
    write(tmp_path, COCO[:1])
    with pytest.raises(DataError, match="no image in the split 'test'"):
        read_karpathy(tmp_path, None, "test")
    with pytest.raises(DataError, match="no split 'restval'"):
        read_karpathy(tmp_path, None, "restval")
    write(tmp_path, COCO, "dataset_two.json")
    with pytest.raises(DataError, match=r"2 files dataset\*\.json .*data\.file"):
        read_karpathy(tmp_path, None, "train")
    (tmp_path / "torn.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"torn\.json. is not valid JSON"):
        read_karpathy(tmp_path, "torn.json", "train")
    (tmp_path / "list.json").write_text('{"images": {}}')
    with pytest.raises(DataError, match="no list 'images'"):
        read_karpathy(tmp_path, "list.json", "train")


def test_captions_of_ones_own(tmp_path):
    rows = [{"image": "a.png", "text": ["one", " two "], "object": "o"}, {"image": "b.png", "text": "three", "id": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_captions(tmp_path / "a.jsonl") == [
        CaptionSample("a.jsonl:1/0", {"image": "a.png"}, "one", "o"),
        CaptionSample("a.jsonl:1/1", {"image": "a.png"}, "two", "o"),
        CaptionSample("x", {"image": "b.png"}, "three"),
    ]
    (tmp_path / "a.csv").write_text('file,caption\na.png,"one, two"\na.png,three\n')
    found = read_captions(tmp_path / "a.csv", {"image": "file", "text": "caption"})
    assert [(s.inputs["image"], s.text) for s in found] == [("a.png", "one, two"), ("a.png", "three")]


def test_a_pictures_name_has_no_blanks_around_it(tmp_path):
    (tmp_path / "a.csv").write_text("image , text\n a.png ,A cat.\n")
    assert [(s.inputs["image"], s.text) for s in read_captions(tmp_path / "a.csv")] == [("a.png", "A cat.")]


def test_a_list_in_one_json_file_is_read(tmp_path):
    """As BLIP's retrieval files are: one caption a record for training, a list of them for testing."""
    rows = [{"image": "a.jpg", "caption": "one", "image_id": "7"}, {"image": "b.jpg", "caption": ["two", "three"]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = read_captions(tmp_path / "a.json", {"text": "caption"})
    assert [(s.id, s.inputs["image"], s.text) for s in found] == [
        ("a.json:1", "a.jpg", "one"), ("a.json:2/0", "b.jpg", "two"), ("a.json:2/1", "b.jpg", "three"),
    ]  # fmt: skip
    for text, match in (
        ("{}", "a dict instead of a list"),
        ("[1]", r"a\.json:1: a int"),
        ("[", "is not valid JSON"),
        ("[" * 100_000, "nests more than 64"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=match):
            read_captions(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"image": "a.png", "text": ""}', r"a\.jsonl:1: no 'text'"),
        ('{"image": "a.png", "text": []}', r"a\.jsonl:1: no 'text'"),
        ('{"image": "a.png", "text": ["x", ""]}', r"a\.jsonl:1: no 'text'"),
        ('{"text": "x"}', r"a\.jsonl:1: no 'image'"),
        ('{"image": "a.png", "text": {"x": 1}}', r"a\.jsonl:1: 'text' is a dict"),
        ("{", r"a\.jsonl:1: not valid JSON"),
        ("", "holds no records"),
    ],
)
def test_faults_of_ones_own_captions(tmp_path, line, match):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=match) as caught:
        read_captions(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["filename", "filepath", "split", "sentences", "object"])


@settings(max_examples=40, deadline=None)
@given(changes=st.dictionaries(FIELDS, VALUES), sentence=VALUES, cut=st.integers(0, 400), own=VALUES)
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, changes, sentence, cut, own):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "images").mkdir()
    (root / "images" / "a.jpg").touch()
    entry = image("a.jpg", "train", "x") | {"sentences": [{"raw": "x"}, sentence]} | changes
    text = json.dumps({"images": [image("a.jpg", "train", "y"), entry]})
    (root / "dataset.json").write_text(text[: -cut or None] if cut < 20 else text)
    (root / "own.jsonl").write_text(json.dumps({"image": "a.jpg", "text": own}) + "\n")
    for read in (lambda: read_karpathy(root, None, "train"), lambda: read_captions(root / "own.jsonl")):
        samples = read_or_refused(read, DataError)
        assert samples is None or all(s.text.strip() and s.inputs["image"] for s in samples)


def test_a_list_in_a_cell_is_several_captions(tmp_path):
    (tmp_path / "a.csv").write_text('image,text\na.png,"[""a dog"", ""a cat""]"\n')
    assert [s.text for s in read_captions(tmp_path / "a.csv")] == ["a dog", "a cat"]


def test_what_programs_write_into_an_empty_cell_is_no_caption_unless_it_is_meant(tmp_path):
    (tmp_path / "a.csv").write_text("image,text\na.png,nan\n")
    with pytest.raises(DataError, match=r"a\.csv:2: 'text' is 'nan', as programs write an empty cell"):
        read_captions(tmp_path / "a.csv")
    assert read_captions(tmp_path / "a.csv", missing=())[0].text == "nan"
