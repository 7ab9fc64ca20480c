"""Files of pictures with numbers."""

import pytest

from mitrain.core.errors import DataError
from mitrain.data.formats.targets import TargetSample, read_targets


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_and_csv_give_the_same_samples(tmp_path):
    lines = '{"image": "a.png", "text": "bad", "target": -2.25, "id": "x"}\n{"image": "b.png", "target": 3, "kind": "k"}\n'
    expected = [
        TargetSample("x", {"image": "a.png"}, "bad", -2.25),
        TargetSample("a:2", {"image": "b.png"}, "", 3.0, kind="k"),
    ]
    found = read_targets(written(tmp_path / "a.jsonl", lines))
    assert found == [expected[0], TargetSample("a.jsonl:2", {"image": "b.png"}, "", 3.0, kind="k")]
    table = "image,sentence,score,id,kind\na.png,bad,-2.25,x,\nb.png,,3e0,y,k\n"
    found = read_targets(written(tmp_path / "a.csv", table), {"text": "sentence", "target": "score"})
    assert found == [expected[0], TargetSample("y", {"image": "b.png"}, "", 3.0, kind="k")]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("", "a.csv:3: no 'target'"),
        ("good", "a.csv:3: 'target' is 'good', no number: write it as 0.5 or -2"),
        ("1_0", "'1_0', no number"),
        ("١", "no number"),
        ("nan", "'nan': give a finite number"),
        ("-inf", "'-inf': give a finite number"),
        ("1e15", "below 10"),
        ('"0,5"', "'0,5', no number: write it as 0.5"),
    ],
)
def test_a_target_that_is_no_number_is_named_with_its_line(tmp_path, cell, message):
    path = written(tmp_path / "a.csv", f"image,target\na.png,1\nb.png,{cell}\n")
    with pytest.raises(DataError, match=message):
        read_targets(path)


def test_files_without_a_sample_or_a_column_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no records"):
        read_targets(written(tmp_path / "a.jsonl", "\n"))
    with pytest.raises(DataError, match="a.csv:1: no column 'target' for target"):
        read_targets(written(tmp_path / "a.csv", "image,text\na.png,b\n"))
    with pytest.raises(DataError, match="the id 'x' stands twice"):
        read_targets(written(tmp_path / "b.csv", "image,target,id\na.png,1,x\na.png,1,x\n"))
    with pytest.raises(DataError, match="'target' is a bool"):
        read_targets(written(tmp_path / "b.jsonl", '{"image": "a.png", "target": true}\n'))
