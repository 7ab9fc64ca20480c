"""Tables as spreadsheets save them: other letters, other marks between cells, each said in one line."""

import pytest

from mitrain.core.errors import DataError
from mitrain.data.formats.labels import read_labels

ROWS = [("image", "text", "label"), ("a.png", "grün, müde", "Vögel"), ("b.png", "«café»; naïve", "Käfer")]


def text(mark):
    """The rows, quoted where the mark stands in a cell."""
    return "\r\n".join(mark.join(f'"{cell}"' if mark in cell else cell for cell in row) for row in ROWS) + "\r\n"


def found(path):
    return [(sample.inputs["image"], sample.text, sample.labels) for sample in read_labels(path)]


EXPECTED = [(image, words, (label,)) for image, words, label in ROWS[1:]]


@pytest.mark.parametrize(
    ("name", "mark", "encoding", "said"),
    [
        ("a.csv", ",", "utf-8", []),
        ("a.csv", ",", "utf-8-sig", []),
        ("a.tsv", "\t", "utf-8-sig", []),
        ("a.csv", ";", "utf-8", ["parted by ';'"]),
        ("a.csv", "\t", "utf-8-sig", ["parted by '\\t'"]),
        ("a.tsv", ",", "utf-8", ["parted by ','"]),
        ("a.csv", "|", "utf-8", ["parted by '|'"]),
        ("a.csv", ",", "latin-1", ["read as Windows-1252 (latin-1)"]),
        ("a.csv", ";", "latin-1", ["read as Windows-1252 (latin-1)", "parted by ';'"]),
        ("a.tsv", "\t", "utf-16", ["read as UTF-16"]),
    ],
)
def test_what_a_spreadsheet_saves_is_read_and_said(tmp_path, caplog, name, mark, encoding, said):
    (tmp_path / name).write_bytes(text(mark).encode(encoding))
    assert found(tmp_path / name) == EXPECTED == found(tmp_path / name)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(said)  # once
    for line, words in zip(lines, said, strict=True):
        assert words in line and str(tmp_path / name) in line and "\n" not in line


@pytest.mark.parametrize(
    "content",
    [
        text(",").encode("utf-8") + "c.png,naïve,x".encode()[:-5],  # one character torn, the others whole
        text(",").encode("utf-8").replace("ü".encode(), b"\xc3"),
        b"image,text,label\na.png,\x81\xe4,x\n",  # of no letter in Windows-1252
        b"image,text,label\na.png,\0\xe4,x\n",
    ],
)
def test_utf_8_that_was_torn_is_no_other_encoding(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.csv' is not UTF-8 text"):
        read_labels(tmp_path / "a.csv")


def test_a_header_with_both_marks_is_read_by_the_one_that_parts_more(tmp_path, caplog):
    (tmp_path / "a.csv").write_text('image;label;"text, or not"\na.png;cat;x\n')
    assert [s.labels for s in read_labels(tmp_path / "a.csv")] == [("cat",)]
    (tmp_path / "b.csv").write_text("image,label,text;more\na.png,cat,x\n")
    assert [s.labels for s in read_labels(tmp_path / "b.csv")] == [("cat",)]
    assert len(caplog.records) == 1
