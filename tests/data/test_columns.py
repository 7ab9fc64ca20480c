"""Many samples as columns: what comes out is what went in."""

import json

import pytest

from mitrain.core.errors import DataError
from mitrain.data import columns
from mitrain.data.columns import Columns, Texts, bytes_of, column, different, gathered, paths, take
from mitrain.data.formats.captions import CaptionSample, read_captions, with_captions
from mitrain.data.formats.labels import LabelSample, read_labels
from mitrain.data.formats.records import AnswerSample, read_records
from mitrain.data.formats.targets import TargetSample, read_targets
from mitrain.data.samples import Sample
from mitrain.training.fingerprint import digests_of


@pytest.fixture(autouse=True)
def packed(monkeypatch):
    """Every number of samples is many, and four texts are a pack."""
    monkeypatch.setattr(columns, "MANY", 1)
    monkeypatch.setattr(columns, "PART", 4)


def labelled(count: int) -> list[LabelSample]:
    """Samples with an image, with an image and a sound, and with neither; texts of letters of one, two and four bytes."""
    files = [{"image": "a.png"}, {"sound": "s.wav", "image": "b.png"}, {}]
    texts = ["a cat", "wóda", "🐈 x", ""]
    return [LabelSample(f"n{i}", files[i % 3], texts[i % 4], (f"l{i % 2}",), kind="k" * (i % 2)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_samples_come_out_as_they_went_in(count):
    samples, kept = labelled(count), gathered(iter(labelled(count)))
    assert isinstance(kept, Columns) and len(kept) == count
    assert list(kept) == samples == [kept[i] for i in range(count)] == list(kept[:])
    assert kept[-1] == samples[-1] and list(kept[1::2]) == samples[1::2]
    assert [list(sample.inputs) for sample in kept] == [list(sample.inputs) for sample in samples]
    with pytest.raises(IndexError):
        kept[count]


@pytest.mark.parametrize("size", [4, 4096])
def test_texts_are_those_that_were_packed(monkeypatch, size):
    monkeypatch.setattr(columns, "PART", size)
    given = ["a", "", "b\0c", "wóda"] * size + [""] * 2 * size + ["🐈", "", "d" * 9]
    texts = Texts()
    for start in range(0, len(given), 3):
        texts.extend(given[start : start + 3])
    assert list(texts) == given == [texts[number] for number in range(len(given))]
    assert texts.some_empty and not Texts().some_empty
    parts = [part for part in texts._parts if isinstance(part, str)]
    assert parts == [columns.BETWEEN * (size - 1)] * 2, "empty texts alone are packed here"


@pytest.mark.parametrize("numbers", [range(9), [7, 0, 3], []])
def test_fields_inputs_and_digests_are_those_of_a_list(numbers):
    samples = [labelled(9)[i] for i in numbers]
    kept = take(take(gathered(labelled(9)), range(9)), numbers)
    assert list(kept) == samples == take(labelled(9), numbers)
    for name in ("id", "text", "labels", "object", "kind"):
        assert list(column(kept, name)) == [getattr(sample, name) for sample in samples]
        assert different(kept, name) == {getattr(sample, name) for sample in samples} == different(samples, name)
    for name in ("image", "sound", "text"):
        assert list(paths(kept, name)) == list(paths(samples, name))
    content = lambda sample: {name: path + "!" for name, path in sample.inputs.items()}  # noqa: E731
    assert digests_of({"train": kept}, content) == digests_of({"train": samples}, content)


def test_no_text_has_more_tokens_than_bytes_are_counted():
    sizes = [len(s.text.encode()) for s in labelled(9)]
    assert list(bytes_of(gathered(labelled(9)))) == sizes == list(bytes_of(labelled(9)))


def test_samples_with_outlines_stay_a_list():
    class Outlined(Sample):
        def __init__(self) -> None:
            self.__dict__.update(id="a", inputs={}, outline={"counts": [1]})

    assert type(gathered([Outlined(), Outlined()])) is list


def written(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "rows.jsonl"


ROWS = [
    {"image": "a.png", "text": " a cat ", "label": "x", "id": "first"},
    {"image": "b.png", "text": "line\none", "label": "y"},
    {"image": "c.png", "label": "x", "kind": None, "object": "thing", "more": ["ignored"]},
    {"image": 4, "text": 1.5, "label": 3},
    {"image": "d.png", "text": "\u00e9", "label": "3"},
    {"image": "e.png", "text": "a \\\\ b", "label": " y "},
]


def one_by_one(monkeypatch):
    monkeypatch.setattr("mitrain.data.formats.alike.Alike._copied", lambda self, block: False)
    monkeypatch.setattr("mitrain.core.parsing.plain_objects", lambda lines: None)


@pytest.mark.parametrize("at_once", [1, 2, 512])
def test_labels_read_together_are_those_read_one_by_one(tmp_path, monkeypatch, at_once):
    path = written(tmp_path, ROWS * 1)
    monkeypatch.setattr("mitrain.data.formats.rows.AT_ONCE", at_once)
    together = list(read_labels(path))
    one_by_one(monkeypatch)
    assert together == list(read_labels(path))
    assert together[1] == LabelSample("rows.jsonl:2", {"image": "b.png"}, "line\none", ("y",))
    assert [sample.labels for sample in together] == [("x",), ("y",), ("x",), ("3",), ("3",), ("y",)]


def test_records_and_targets_read_together_are_those_read_one_by_one(tmp_path, monkeypatch):
    asked = [
        {"image": f"{i}.png", "prompt": f"which {i}", "answer": f"a{i % 2}", "candidates": ["a0", "a1"]} for i in range(7)
    ]
    asked += [{"image": "x.png", "prompt": "many?", "answer": ["yes", "no", "no"]}, {**asked[0], "candidates": ["a0"]}]
    rated = [{"image": f"{i}.png", "text": f"t{i}", "target": value} for i, value in enumerate([1, 2.5, 0, -3e3])]
    records, targets = tmp_path / "records", tmp_path / "targets"
    records.mkdir()
    targets.mkdir()
    found = list(read_records(written(records, asked))), list(read_targets(written(targets, rated)))
    one_by_one(monkeypatch)
    assert found == (list(read_records(records / "rows.jsonl")), list(read_targets(targets / "rows.jsonl")))
    assert found[0][7] == AnswerSample("rows.jsonl:8", {"image": "x.png"}, "many?", "no", references=("yes", "no", "no"))
    assert found[1][1] == TargetSample("rows.jsonl:2", {"image": "1.png"}, "t1", 2.5)


GOOD = '{"image": "a.png", "text": "t", "label": "x"}'


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ('{"image": "a.png", "text": "t", "label": "x", "label": "x"}', "'label' stands twice"),
        (
            '{"image": "a.png", "text": "t", "label": "x"},{"image": "a.png", "label": "x"}',
            "is not valid JSON|not valid JSON",
        ),
        ('{"image": "a.png", "text": "\\u0007", "label": "x"}', "control character"),
        ('{"image": "", "text": "t", "label": "x"}', "no 'image'"),
        ('{"image": "a.png", "text": "t"}', "no 'label'"),
        ('{"image": "a.png", "text": "t", "label": true}', "'label' is a bool"),
        ('{"image": "a.png", "text": "t", "label": "nan"}', "'label' is 'nan'"),
        ('{"image": "a.png", "text": "t", "label": "x", "id": "rows.jsonl:1"}', "stands twice"),
        ('{"image": "a.png", "text": "\\ud800", "label": "x"}', "not valid JSON"),
        ('["a"]', "a list instead of an object"),
        ("{}", "no 'image'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_though_a_later_line_is_wrong_too(tmp_path, bad, what):
    (tmp_path / "rows.jsonl").write_text("\n".join([GOOD, GOOD, bad, GOOD, "{", ""]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*({what})"):
        read_labels(tmp_path / "rows.jsonl")


def test_a_key_that_stands_twice_is_named_among_lines_that_are_right(tmp_path):
    twice = '{"image": "a.png", "text": "t", "text": "u", "label": "x"}'
    (tmp_path / "rows.jsonl").write_text("\n".join([GOOD, twice, GOOD]), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*'text' stands twice"):
        read_labels(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("more", ["5", '"y"', "null", "[1]"])
def test_a_second_value_in_a_line_is_named_with_it(tmp_path, more):
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{GOOD},{more}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*not valid JSON"):
        read_labels(tmp_path / "rows.jsonl")


def test_an_empty_record_is_named_before_those_of_another_kind(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{}\n{"conversations": [{"from": "human", "value": "a"}]}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no 'image'"):
        read_labels(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"conversations": [{"from": "human", "value": "a"}]}\n{}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the record is of conversations"):
        read_labels(tmp_path / "rows.jsonl")


def test_an_object_over_two_lines_is_no_object_a_line(tmp_path):
    lines = [
        '{"image": "a.png", "label": "x"}, {"image": "b.png", "label": "x"}',
        '{"image": "c.png", "label": ["x"',
        '"y"]}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        read_labels(tmp_path / "rows.jsonl", multilabel=True)


CAPTIONS = [
    {"image": "a.png", "text": "a cat"},
    {"image": "b.png", "text": ["a dog", "dogs"], "id": "two"},
    {"image": "a.png", "text": " the cat ", "object": "cat"},
    {"image": "c.png", "text": '["x", "y"]'},
    {"image": "c.png", "text": "(no list"},
    {"image": "a.png", "text": "a cat"},
]


@pytest.mark.parametrize("at_once", [1, 2, 512])
def test_captions_read_together_are_those_read_one_by_one(tmp_path, monkeypatch, at_once):
    path = written(tmp_path, CAPTIONS)
    monkeypatch.setattr("mitrain.data.formats.rows.AT_ONCE", at_once)
    kept = read_captions(path)
    one_by_one(monkeypatch)
    monkeypatch.setattr(columns, "MANY", 100)
    plain = read_captions(path)
    assert isinstance(kept, Columns) and type(plain) is list and list(kept) == plain
    each = [("a cat", "the cat", "a cat"), ("a dog", "dogs"), ("x", "y", "(no list")]
    shared = [each[i] for i in (0, 1, 1, 0, 2, 2, 2, 0)]
    assert [sample.captions for sample in plain] == shared
    for numbers in (range(8), [7, 2, 4]):
        part = take(kept, numbers)
        assert [sample.captions for sample in part] == [shared[i] for i in numbers] == list(column(part, "captions"))
        assert different(part, "captions") == {shared[i] for i in numbers}


def test_files_without_texts_need_none(tmp_path):
    kept = read_captions(written(tmp_path, [{"image": "a.png", "text": 3.5}, {"image": "b.png"}]), has_texts=False)
    assert isinstance(kept, Columns) and [(s.text, s.inputs["image"]) for s in kept] == [("", "a.png"), ("", "b.png")]


@pytest.mark.parametrize("text", ["nan", ["a", ""], "", 5.5, True])
def test_captions_that_are_none_are_named_with_their_line(tmp_path, text):
    path = written(tmp_path, [{"image": "a.png", "text": "a"}, {"image": "b.png", "text": text}])
    if text == 5.5:
        assert read_captions(path)[1].text == "5.5"
    else:
        with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
            read_captions(path)


def test_captions_of_a_picture_are_gathered_all_the_same():
    given = [CaptionSample(f"n{i}", {"image": "a" if i < 2 else f"b{i}"}, f"t{i}") for i in range(5)]
    kept = with_captions(gathered(given))
    assert isinstance(kept, Columns) and list(kept) == given
    assert [sample.captions for sample in kept] == [("t0", "t1")] * 2 + [("t2",), ("t3",), ("t4",)]
    assert [sample.captions for sample in with_captions(given)] == [sample.captions for sample in kept]
