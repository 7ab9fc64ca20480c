"""Records in JSONL and CSV, with a user's own columns; every fault named by file and line."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import read_or_refused

from mitrain.core.errors import DataError
from mitrain.data.formats.records import AnswerSample, read_records

ROW = {"id": "a", "image": "a.png", "prompt": "What is it?", "answer": "cat", "candidates": ["cat", "dog"]}


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl(tmp_path):
    full = ROW | {"kind": "category", "object": "tabby", "unknown": [1]}
    short = {"image": "b.png", "prompt": "And this?", "answer": 7}
    samples = read_records(write(tmp_path / "a.jsonl", full, "", short))
    assert samples == [
        AnswerSample("a", {"image": "a.png"}, "What is it?", "cat", ("cat", "dog"), "category", "tabby"),
        AnswerSample("a.jsonl:3", {"image": "b.png"}, "And this?", "7"),
    ]


def test_cells_have_no_blanks_around_them(tmp_path):
    (tmp_path / "a.csv").write_text("image, prompt ,answer,candidates\n a.png , What?, a cat, a cat | a dog|a cat\n")
    (found,) = read_records(tmp_path / "a.csv")
    assert (found.inputs["image"], found.prompt, found.answer) == ("a.png", "What?", "a cat")
    assert found.candidates == ("a cat", "a dog")


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path, suffix, delimiter):
    path = tmp_path / f"a{suffix}"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["image", "prompt", "answer", "candidates", "note"])
        writer.writerow(["a.png", 'One,\ttwo "or"\nthree?', "zwölf", "zwölf | drei", "x"])
        writer.writerow([])
        writer.writerow(["b.png", "What?", "no", "", ""])
    first, second = read_records(path)
    assert (first.prompt, first.answer, first.candidates) == ('One,\ttwo "or"\nthree?', "zwölf", ("zwölf", "drei"))
    assert (second.inputs["image"], second.candidates) == ("b.png", ())
    assert first.id != second.id


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_columns_of_ones_own(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("file,question,label,answer\na.png,What?,cat,ignored\n")
    else:
        write(path, {"file": "a.png", "question": "What?", "label": "cat", "answer": "ignored"})
    (sample,) = read_records(path, {"image": "file", "prompt": "question", "answer": "label"})
    assert (sample.inputs["image"], sample.prompt, sample.answer) == ("a.png", "What?", "cat")


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([ROW, "{broken"], r"a\.jsonl:2: not valid JSON"),
        ([ROW, "[1, 2]"], r"a\.jsonl:2: a list instead of an object"),
        (["[" * 100_000], r"a\.jsonl:1: nests more than 64 levels deep"),
        ([ROW | {"image": ""}], r"a\.jsonl:1: no 'image'"),
        ([{"image": "a.png", "prompt": "What?"}], r"a\.jsonl:1: no 'answer'"),
        ([ROW | {"prompt": "  "}], r"a\.jsonl:1: no 'prompt'"),
        ([ROW | {"answer": [["cat"]]}], r"a\.jsonl:1: 'answer' is a list"),
        ([ROW | {"answer": []}], r"a\.jsonl:1: 'answer' is a list with no answer"),
        ([ROW | {"answer": ["cat", " "]}], r"a\.jsonl:1: 'answer' is a list with an empty answer"),
        ([ROW | {"answer": ["cat", "nan"], "candidates": []}], r"a\.jsonl:1: 'answer' is 'nan'"),
        ([ROW | {"answer": [{"answer": "cat"}]}], r"a\.jsonl:1: 'answer' is a dict"),
        ([ROW | {"answer": True}], r"a\.jsonl:1: 'answer' is a bool"),
        ([ROW | {"answer": 10**30}], r"a\.jsonl:1: 'answer' is a int"),
        (['{"image": "a", "prompt": "b", "answer": NaN}'], r"a\.jsonl:1: 'answer' is a float"),
        ([ROW | {"candidates": "cat"}], r"a\.jsonl:1: 'candidates' is no list"),
        ([ROW | {"candidates": [["cat"]]}], r"a\.jsonl:1: 'candidates' is a list"),
        ([ROW | {"answer": "cow"}], r"a\.jsonl:1: the answer 'cow' is not among the candidates"),
        ([ROW, ROW], r"a\.jsonl:2: the id 'a' stands twice"),
        ([], "holds no records"),
        (["", "   "], "holds no records"),
    ],
)
def test_faults_of_jsonl(tmp_path, rows, match):
    with pytest.raises(DataError, match=match) as caught:
        read_records(write(tmp_path / "a.jsonl", *rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image,promt,answer\na,b,c\n", r"a\.csv:1: no column 'prompt' for prompt \(did you mean 'promt'\?\)"),
        ("image,prompt,answer,answer\na,b,c,d\n", r"a\.csv:1: two columns 'answer'"),
        ("image,prompt,answer\na,b\n", r"a\.csv:2: no 'answer'"),
        ("image,prompt,answer\na,b,c\na,b,c,d\n", r"a\.csv:3: 4 cells under 3 columns"),
        ('image,prompt,answer\na,b,"c', r"a\.csv:2: not valid CSV"),
        ('image,prompt,answer\na,"b"x,c\n', r"a\.csv:2: not valid CSV"),
        ("image,prompt,answer\na," + "b" * 200_000 + ",c\n", r"a\.csv:2: not valid CSV"),
        (
            'image,prompt,answer\na,b,c\n\na,"b,c\nd,e,f\ng,h,i\n',
            r"a\.csv:4: not valid CSV \(a quote that is not closed, read to",
        ),
        (
            'image,prompt,answer\na,"b,c\nd,e,f\ng,"h,i\n',
            r"a\.csv:2: not valid CSV \(.*, read to line 4\): close its quotes",
        ),
        ('image,prompt,answer\na,"b\nc",d\ne,f\n', r"a\.csv:4: no 'answer'"),
        ('image,prompt,answer\na,"b\nc",\n', r"a\.csv:2: no 'answer'"),
        ("image,prompt,answer\n", "holds no records"),
        ("", "holds no records"),
    ],
)
def test_faults_of_csv(tmp_path, text, match):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        read_records(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_other_faults(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="is no data set of save_to_disk .* name a file"):
        read_records(tmp_path)
    with pytest.raises(DataError, match=r"columns\.promt is not a field \(did you mean 'prompt'\?\)"):
        read_records(write(tmp_path / "a.jsonl", ROW), {"promt": "question"})
    (tmp_path / "latin.jsonl").write_bytes(b'{"image": "\xe4.png"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(tmp_path / "latin.jsonl")


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), st.lists, max_leaves=4)
ROWS = st.dictionaries(st.sampled_from([*ROW, "kind", "other"]), VALUES)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROWS | VALUES, max_size=4), noise=st.binary(max_size=12), suffix=st.sampled_from(["jsonl", "csv"]))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, rows, noise, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a.{suffix}"
    start = b"image,prompt,answer,candidates\n" if suffix == "csv" else b""
    path.write_bytes(start + "\n".join(map(json.dumps, rows)).encode() + noise)
    samples = read_or_refused(lambda: read_records(path), DataError)
    assert samples is None or all(isinstance(sample, AnswerSample) for sample in samples)


def test_several_answers_are_references_and_the_commonest_is_the_answer(tmp_path):
    rows = [ROW | {"answer": ["dog", "cat", "cat", "dog", 2], "id": None}, ROW | {"answer": ["cat"]}]
    first, second = read_records(write(tmp_path / "a.jsonl", *rows))
    assert (first.answer, first.references) == ("dog", ("dog", "cat", "cat", "dog", "2"))
    assert (second.answer, second.references) == ("cat", ("cat",))
    (tmp_path / "a.csv").write_text("image,prompt,answers\na.png,p,\"['cat', 'dog', 'dog']\"\n")
    (found,) = read_records(tmp_path / "a.csv", {"answer": "answers"})
    assert (found.answer, found.references) == ("dog", ("cat", "dog", "dog"))


def test_a_list_in_a_cell_is_candidates(tmp_path):
    (tmp_path / "a.csv").write_text("image,prompt,answer,candidates\na.png,p,cat,\"['cat', 'dog']\"\n")
    assert read_records(tmp_path / "a.csv")[0].candidates == ("cat", "dog")


SENTENCES = {"images": [{"sentences": [], "split": "train"}], "dataset": "coco"}
COCO = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "id": 1, "caption": "a dog"}]}
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "dog"}]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            [{"id": "1", "image": "0.png", "conversations": TURNS}],
            r"a\.json:1: the record is of conversations, as LLaVA's: data.name=conversations",
        ),
        ([{"messages": TURNS, "images": ["0.png"]}], "the record is of conversations"),
        (
            {"questions": [{"image_id": 1, "question_id": 1, "question": "?"}]},
            "VQA's questions: data.name=vqa",
        ),
        (
            {"annotations": [{"question_id": 1, "multiple_choice_answer": "dog"}]},
            "VQA's answers: data.name=vqa",
        ),
        (COCO, r"holds COCO's captions: data\.name=coco-captions .*data\.name=karpathy"),
        (
            {"images": [], "annotations": [{"id": 1, "segmentation": []}]},
            r"holds COCO's instances: data\.name=expressions",
        ),
        (SENTENCES, r"holds Karpathy's captions: data\.name=karpathy"),
        ({"rows": []}, "holds a dict instead of a list"),
    ],
)
def test_a_format_of_others_is_named_with_the_way_to_convert_it(tmp_path, value, said):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=said):
        read_records(tmp_path / "a.json")


def test_hostile_files_are_refused(tmp_path):
    with open(tmp_path / "sparse.json", "wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(DataError, match="longer than"):
        read_records(tmp_path / "sparse.json")
    with open(tmp_path / "sparse.jsonl", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="more than .* characters in line 1"):
        read_records(tmp_path / "sparse.jsonl")
    for name in ("zero.jsonl", "zero.csv", "zero.json"):
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(DataError, match="is not a plain file"):
            read_records(tmp_path / name)
    with pytest.raises(DataError, match="the key 'answer' stands twice"):
        read_records(write(tmp_path / "a.jsonl", '{"image": "a", "prompt": "b", "answer": "c", "answer": "d"}'))


def test_what_programs_write_into_an_empty_cell_is_no_answer_unless_it_is_meant(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, ROW | {"id": "b", "answer": "nan", "candidates": []})
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'answer' is 'nan', as programs write an empty cell"):
        read_records(path)
    assert read_records(path, missing=())[1].answer == "nan"
    offered = write(tmp_path / "b.jsonl", ROW | {"answer": "None", "candidates": ["None", "one"]})
    assert read_records(offered)[0].answer == "None"
    with pytest.raises(DataError, match=r"c\.jsonl:1: 'prompt' is 'NaN'"):
        read_records(write(tmp_path / "c.jsonl", ROW | {"prompt": "NaN"}))
