"""Labelled pictures in JSONL and CSV; every fault named by file and line."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import read_or_refused

from mitrain.core import config
from mitrain.core.errors import DataError
from mitrain.data.formats.labels import LabelSample, read_labels
from mitrain.data.sources import LabelledConfig

ROW = {"id": "a", "image": "a.png", "text": "a red apple", "label": "food"}


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_and_csv_say_the_same(tmp_path):
    rows = [ROW | {"object": "apple", "kind": "k", "other": [1]}, {"image": "b.png", "label": 7}]
    found = read_labels(write(tmp_path / "a.jsonl", *rows))
    assert found == [
        LabelSample("a", {"image": "a.png"}, "a red apple", ("food",), "apple", "k"),
        LabelSample("a.jsonl:2", {"image": "b.png"}, "", ("7",)),
    ]
    (tmp_path / "a.csv").write_text("id,image,text,label,object,kind\na,a.png,a red apple,food,apple,k\n,b.png,,7\n")
    assert [s.labels for s in read_labels(tmp_path / "a.csv")] == [("food",), ("7",)]
    assert read_labels(tmp_path / "a.csv")[0] == found[0]


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", content)
    return buffer.getvalue()


@pytest.mark.parametrize(("cell", "labels"), [("a|b", ("a", "b")), (" a | b |a", ("a", "b")), ("", ()), ("a", ("a",))])
def test_several_labels(tmp_path, cell, labels):
    (tmp_path / "a.csv").write_text(f"image,text,label\nx.png,t,{cell}\n")
    assert read_labels(tmp_path / "a.csv", multilabel=True)[0].labels == labels
    assert read_labels(write(tmp_path / "a.jsonl", ROW | {"label": list(labels)}), multilabel=True)[0].labels == labels
    (tmp_path / "b.csv").write_text(f"image,text,label\nx.png,t,{cell.replace('|', ';')}\n")
    assert read_labels(tmp_path / "b.csv", multilabel=True, separator=";")[0].labels == labels


def test_a_users_own_columns(tmp_path):
    (tmp_path / "a.tsv").write_text("file\ttitle\tclass\na.png\ta, b\tfood\n")
    found = read_labels(tmp_path / "a.tsv", {"image": "file", "text": "title", "label": "class"})
    assert (found[0].inputs["image"], found[0].text, found[0].labels) == ("a.png", "a, b", ("food",))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([ROW, "{broken"], r"a\.jsonl:2: not valid JSON"),
        ([ROW | {"image": " "}], r"a\.jsonl:1: no 'image'"),
        ([{"image": "a.png"}], r"a\.jsonl:1: no 'label'"),
        ([ROW | {"label": ""}], r"a\.jsonl:1: 'label' is empty"),
        ([ROW | {"label": None}], r"a\.jsonl:1: 'label' is empty"),
        ([ROW | {"label": ["a", "b"]}], r"a\.jsonl:1: 'label' is a list: .*multilabel"),
        ([ROW | {"label": {"a": 1}}], r"a\.jsonl:1: 'label' is a dict"),
        ([ROW | {"text": ["x"]}], r"a\.jsonl:1: 'text' is a list"),
        ([ROW, ROW], r"a\.jsonl:2: the id 'a' stands twice"),
        ([ROW, ROW | {"id": "b", "label": "fod"}], r"a\.jsonl:2: the label 'fod' is no class \(did you mean 'food'"),
        ([], "holds no records"),
    ],
)
def test_faults(tmp_path, rows, match):
    with pytest.raises(DataError, match=match) as caught:
        read_labels(write(tmp_path / "a.jsonl", *rows), known=("food", "toy"))
    assert "\n" not in str(caught.value)


def test_faults_of_several_labels_and_of_headers(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'label' holds an empty label"):
        read_labels(write(tmp_path / "a.jsonl", ROW | {"label": ["a", " "]}), multilabel=True)
    (tmp_path / "a.csv").write_text("image,text,lable\na.png,x,food\n")
    with pytest.raises(DataError, match=r"a\.csv:1: no column 'label' for label \(did you mean 'lable'"):
        read_labels(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_column_that_was_asked_for_must_be_there(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", *([ROW] if suffix == "jsonl" else ["image,text,label", "a.png,x,food"]))
    with pytest.raises(DataError, match=rf"a\.{suffix}' has no 'txt' \(did you mean 'text'\?\) in any record") as caught:
        read_labels(path, {"text": "txt"})
    assert "image, label, text: correct columns.text=txt" in str(caught.value).replace("id, image", "image")


def test_headers_and_pictures_have_no_blanks_around_them(tmp_path):
    (tmp_path / "a.csv").write_text("\n \nimage, label , text\na.png ,food,an apple\n")
    (found,) = read_labels(tmp_path / "a.csv")
    assert (found.inputs["image"], found.text, found.labels) == ("a.png", "an apple", ("food",))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zipped])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_compressed_files_are_named_as_such(tmp_path, pack, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(pack(bytes(range(256))))
    with pytest.raises(DataError, match=rf"a\.{suffix}' is compressed, or a spreadsheet: unpack it"):
        read_labels(tmp_path / f"a.{suffix}")


def test_half_of_a_character_is_refused_and_a_whole_one_read(tmp_path):
    assert read_labels(write(tmp_path / "a.jsonl", ROW | {"text": "\N{PILE OF POO}"}))[0].text == "\N{PILE OF POO}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: not valid JSON .*surrogates"):
        read_labels(write(tmp_path / "a.jsonl", ROW | {"text": "\ud83d"}))


def section(**values) -> LabelledConfig:
    return config.choose("data", {"name": "labelled", "root": "x", **values})


def test_the_classes_are_those_of_training(tmp_path):
    write(tmp_path / "train.jsonl", ROW, ROW | {"id": "b", "label": "toy"})
    write(tmp_path / "val.jsonl", ROW | {"label": "animal"})
    assert section().class_names(tmp_path) == ("food", "toy")
    assert section().split_names(tmp_path) == ["train", "val"]
    with pytest.raises(DataError, match=r"val\.jsonl:1: the label 'animal' is no class"):
        section().read(tmp_path, "val")
    assert section(classes=["animal", "food", "toy"]).read(tmp_path, "val")[0].labels == ("animal",)
    write(tmp_path / "train.jsonl", ROW)
    with pytest.raises(DataError, match="1 different label"):
        section().class_names(tmp_path)


def test_labels_that_differ_in_case_alone_are_pointed_out(tmp_path, caplog):
    write(tmp_path / "train.jsonl", ROW, ROW | {"id": "b", "label": "Food"}, ROW | {"id": "c", "label": "toy"})
    assert section().class_names(tmp_path) == ("Food", "food", "toy")
    assert caplog.text.count("'Food' and 'food', which count as two") == 1 and "toy" not in caplog.text


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), st.lists, max_leaves=4)
ROWS = st.dictionaries(st.sampled_from([*ROW, "kind", "other"]), VALUES)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(ROWS | VALUES, max_size=4),
    noise=st.binary(max_size=12),
    suffix=st.sampled_from(["jsonl", "csv"]),
    multilabel=st.booleans(),
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, rows, noise, suffix, multilabel):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{suffix}"
    start = b"image,text,label\n" if suffix == "csv" else b""
    path.write_bytes(start + "\n".join(map(json.dumps, rows)).encode() + noise)
    samples = read_or_refused(lambda: read_labels(path, multilabel=multilabel), DataError)
    for sample in samples or ():
        assert sample.inputs["image"].strip() and (multilabel or len(sample.labels) == 1) and all(sample.labels)


@pytest.mark.parametrize(
    "cell",
    [
        "\"['cat', 'dog']\"", '"[""cat"", ""dog""]"', "\"('cat', 'dog')\"", "\"{'dog', 'cat'}\"", "['cat' 'dog']", "cat|dog",
    ],
)  # fmt: skip
def test_a_list_in_a_cell_is_several_labels_or_refused(tmp_path, cell):
    (tmp_path / "a.csv").write_text(f"image,text,label\nx.png,t,{cell}\ny.png,t,[other]\n")
    assert [s.labels for s in read_labels(tmp_path / "a.csv", multilabel=True)] == [("cat", "dog"), ("[other]",)]
    if cell != "cat|dog":
        with pytest.raises(DataError, match=r"a\.csv:2: 'label' is a list: .*data.multilabel=true"):
            read_labels(tmp_path / "a.csv")


@pytest.mark.parametrize("vector", ["[1, 0, 0]", "0|1|0", "[0.0, 1.0, 1.0]", "[1 0 0]", "[0. 1. 0.]"])
def test_a_vector_of_zeros_and_ones_is_no_list_of_labels(tmp_path, vector):
    (tmp_path / "a.csv").write_text(f'image,text,label\nx.png,t,"{vector}"\n')
    with pytest.raises(DataError, match=r"a\.csv:2: 'label' is a vector of zeros and ones, .*: give the names"):
        read_labels(tmp_path / "a.csv", multilabel=True)
    if "," in vector:
        with pytest.raises(DataError, match="a vector of zeros and ones"):
            read_labels(write(tmp_path / "a.jsonl", ROW | {"label": json.loads(vector)}), multilabel=True)
    assert read_labels(write(tmp_path / "b.jsonl", ROW | {"label": [1, 0]}), multilabel=True)[0].labels == ("1", "0")


@pytest.mark.parametrize("label", ["(3, 4)", "(cat)", "[a cat]", "('cat')", "{a, b}"])
def test_text_in_brackets_is_a_text(tmp_path, label):
    assert read_labels(write(tmp_path / "a.jsonl", ROW | {"label": label}))[0].labels == (label,)


@pytest.mark.parametrize("other", [[0, 1], [1, 0]])
def test_vectors_of_two_classes_are_no_labels(tmp_path, other):
    write(tmp_path / "train.jsonl", ROW | {"label": [1, 0]}, ROW | {"id": "b", "label": other})
    with pytest.raises(DataError, match="every 'label' is a vector of a zero and a one: give the names of the labels"):
        section(multilabel=True).class_names(tmp_path)
    write(tmp_path / "train.jsonl", ROW | {"label": [1, 0]}, ROW | {"id": "b", "label": [1]})  # digits as classes
    assert section(multilabel=True).class_names(tmp_path) == ("0", "1")


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "<NA>", "NA"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_what_programs_write_into_an_empty_cell_is_no_class_unless_it_is_meant(tmp_path, word, multilabel):
    (tmp_path / "train.csv").write_text(f"image,text,label\na.png,x,food\nb.png,{word},{word}\n")
    files = {"splits": {"train": "train.csv"}, "multilabel": multilabel}
    with pytest.raises(DataError, match=rf"train\.csv:3: 'label' is '{word}', .*fill it in, or give data\.missing=\[\]"):
        section(**files).class_names(tmp_path)
    assert set(section(**files, missing=[]).class_names(tmp_path)) == {"food", word}
    assert section(**files, classes=["food", word]).read(tmp_path, "train")[1] == LabelSample(
        "train.csv:3", {"image": "b.png"}, word, (word,)
    )


@pytest.mark.parametrize("character", ["\0", "\x01", "\x1b", "\x7f", "\x92"])
@pytest.mark.parametrize("column", ["image", "text", "label"])
def test_control_characters_in_a_cell_are_refused(tmp_path, column, character):
    cells = {"image": "a.png", "text": "x", "label": "food"}
    cells[column] = cells[column][:1] + character + cells[column][1:]
    (tmp_path / "a.csv").write_text(f"image,text,label\n{','.join(cells.values())}\n", encoding="utf-8")
    for path in (tmp_path / "a.csv", write(tmp_path / "a.jsonl", cells)):
        with pytest.raises(DataError) as error:
            read_labels(path)
        assert f"{column!r} holds the control character {character!r}: remove it" in str(error.value)
    white = ROW | {"text": "a\tb\nc\x0bd"}
    assert read_labels(write(tmp_path / "b.jsonl", white))[0].text == white["text"]


def test_every_sample_with_all_labels_is_pointed_out(tmp_path, caplog):
    write(tmp_path / "train.jsonl", ROW | {"label": ["a", "b"]}, ROW | {"id": "b", "label": ["b", "a"]})
    assert section(multilabel=True).class_names(tmp_path) == ("a", "b")
    assert "gives every sample all 2 labels: nothing tells them apart" in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("1", "1.0", ("'1'", "'1.0'")),
        ("01", "1", ("'01'", "'1'")),
        ("caf\u00e9", "cafe\u0301", ("'caf\\xe9'", "'cafe\\u0301'")),
        ("dog", "dog\u200b", ("'dog'", "'dog\\u200b'")),
        ("Dog", "dog", ("'Dog'", "'dog'")),
    ],
)
def test_labels_that_look_alike_are_told_apart_in_a_warning(tmp_path, caplog, one, other, shown):
    write(tmp_path / "train.jsonl", ROW | {"label": one}, ROW | {"id": "b", "label": other}, ROW | {"id": "c"})
    assert len(section().class_names(tmp_path)) == 3
    found = {caplog.records[0].args[1], caplog.records[0].args[2]}
    assert len(caplog.records) == 1 and found == set(shown)


def test_the_class_of_the_same_number_is_what_was_meant(tmp_path):
    with pytest.raises(DataError, match=r"the label '0' is no class \(did you mean '0\.0'\?\)"):
        read_labels(write(tmp_path / "a.jsonl", ROW | {"label": 0}), known=("0.0", "1.0"))
