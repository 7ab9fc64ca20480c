"""Many samples at once: a table's rows from the command line, lists in Python, and every prediction of an evaluation."""

import csv
import functools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from commands import as_json
from exported import PROMPT, make_run
from PIL import Image

from mitrain.cli import main
from mitrain.core import config
from mitrain.core.errors import DataError
from mitrain.core.files import file_lock
from mitrain.data.formats.rle import decode_mask, encode_mask
from mitrain.inference import bulk, export, scoring
from mitrain.inference.export import Pretrained
from mitrain.training import runs


@pytest.fixture(scope="module")
def images(world):
    return sorted((world / "data" / "images").glob("*.png"))[:6]


def table(path, images, **columns):
    with open(path, "w", newline="") as file:
        rows = csv.DictWriter(file, ["image", *columns])
        rows.writeheader()
        rows.writerows({"image": f"images/{p.name}", **{n: v[i] for n, v in columns.items()}} for i, p in enumerate(images))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_rows_of_a_table_are_asked_and_gone_on_with(world, run, images, tmp_path, capsys, monkeypatch):
    choices = ["red|green", "", "", "", "", ""]
    source = table(world / "data" / "ask.csv", images, prompt=[PROMPT] * 6, candidates=choices, answer=[""] * 6)
    command = ["predict", str(run), "--data", str(source), "--out", str(tmp_path / "out.jsonl"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) | {"out": 0} == {
        "out": 0,
        "rows": 6,
        "kept": 0,
        "asked": 6,
        "bad_samples": 0,
    }
    found, opened = lines(tmp_path / "out.jsonl"), runs.open_run(run)
    for number, (line, path) in enumerate(zip(found, images, strict=True)):
        alone = scoring.ask(opened, {"image": path}, PROMPT, candidates=["red", "green"] if number == 0 else None).values
        assert line["id"] == f"ask.csv:{number + 2}" and line["image"] == f"images/{path.name}"
        assert line["answer"] == alone["answer"] and line["generated"] == alone["generated"]
        assert line["probabilities"] == pytest.approx(alone["probabilities"], abs=2e-6)
    assert set(found[0]["probabilities"]) == {"red", "green"} != set(found[1]["probabilities"])
    text = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text("".join(text[:3]) + text[3][:30])
    asked = []
    monkeypatch.setattr(bulk, "ask_all", lambda run, rows, **how: asked.extend(rows) or scoring.ask_all(run, rows))
    assert main(command) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["kept"], again["asked"]) == (3, 3) and [one.files["image"].name for one in asked] == [
        path.name for path in images[3:]
    ]
    assert (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)[:3] == text[:3]
    for line, before in zip(lines(tmp_path / "out.jsonl"), found, strict=True):  # answered beside others: rounding moves
        chances = before.pop("probabilities")
        assert line.pop("probabilities") == pytest.approx(chances, abs=2e-6) and line == before


def test_conversations_are_asked_their_last_question(world, images, tmp_path, capsys):
    """Answered or not; what was said before stands before it, as training has it."""
    opened = runs.open_run(make_run(world, "dialogue"))
    data = {"name": "conversations", "root": str(world / "data")}
    opened.config = opened.config.model_copy(
        update={"data": config.choose("data", {**data, "inputs": ["image"], "bad_share": 0.5})}
    )
    shown = [{"type": "image", "image": f"images/{images[0].name}"}, {"type": "text", "text": PROMPT}]
    turns = [("user", shown), ("assistant", "red"), ("user", "is this red"), ("assistant", "yes")]
    rows = [{"id": str(n), "messages": [{"role": role, "content": words} for role, words in turns[:n]]} for n in (1, 3, 4)]
    (source := world / "data" / "talks.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"messages": []}])))
    found = bulk.predict_rows(opened, source, tmp_path / "out.jsonl", {"max_new_tokens": 3})
    assert (found["asked"], found["bad_samples"]) == (3, 1)
    one, two, three = lines(tmp_path / "out.jsonl")
    assert one["prompt"] == PROMPT and two["prompt"] == three["prompt"] == f"{PROMPT}\nred\nis this red"
    assert two["generated"] == three["generated"] and two["model"].endswith(", max_new_tokens=3")
    for line, prompt in ((one, PROMPT), (two, f"{PROMPT} red and is this red")):
        asked = scoring.ask(opened, {"image": images[0]}, prompt, generation={"max_new_tokens": 3})
        assert line["generated"] == asked.values["generated"]
    bulk.predict_rows(opened, table(world / "data" / "flat.csv", images[:1], prompt=[PROMPT]), tmp_path / "flat.jsonl")
    assert len(lines(tmp_path / "flat.jsonl")) == 1  # questions in columns are asked, too


def test_a_file_that_another_process_writes_is_left_to_it(world, run, images, tmp_path, capsys):
    source, out = table(world / "data" / "lock.csv", images[:1], prompt=[PROMPT]), tmp_path / "out.jsonl"
    with file_lock(f"{out}.lock"):
        for command in (["predict", str(run), "--data", str(source)], ["eval", str(run), "--split", "test"]):
            assert main([*command, "--out", str(out)]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"holds {out}.lock" in said and not out.exists()
    assert main(["predict", str(run), "--data", str(source), "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_how_the_model_speaks_is_said_beside_the_score(world, run, images, capsys):
    found = as_json(capsys, "eval", run, "--split", "test", "--max-new-tokens", "2")
    assert found["generation"] == {"max_new_tokens": 2} and "exact_match" in found
    asked = ["predict", str(run), "--image", str(images[0]), "--text", "this thing is", "--json"]
    for options, words in (([], 8), (["--max-new-tokens", "2"], 2)):
        assert main([*asked, *options]) == 0
        assert len(json.loads(capsys.readouterr().out)["generated"].split()) == words
    assert main([*asked, "--beams", "2", "--temperature", "1"]) == 2
    assert "beams search for the likeliest text and temperature draws one" in capsys.readouterr().err
    segment = make_run(world, "segment")
    assert main(["predict", str(segment), "--image", str(images[0]), "--text", "red square", "--beams", "2"]) == 2
    assert "beams say how text is generated, which only the tasks" in capsys.readouterr().err


def test_lines_of_another_model_or_of_other_rows_are_left_alone(world, run, images, tmp_path, capsys):
    source, out = table(world / "data" / "two.csv", images[:2], prompt=[PROMPT] * 2), tmp_path / "out.jsonl"
    command = ["predict", str(run), "--data", str(source), "--out", str(out)]
    assert main(command) == 0
    before = out.read_text()
    assert main([*command, "--checkpoint", "latest"]) == 2
    assert f"{out}:1 is no answer of colours, step 6" in capsys.readouterr().err
    table(source, images[1:3], prompt=[PROMPT] * 2)
    assert main(command) == 2
    assert "to a row of this table: give a new file with --out" in capsys.readouterr().err
    assert out.read_text() == before


def test_bad_rows_are_left_out_as_far_as_the_budget_goes(world, run, images, tmp_path, capsys):
    (world / "data" / "images" / "torn.png").write_bytes(images[0].read_bytes()[:60])
    names = [*images, world / "data" / "images" / "torn.png", *images, *images[:2]]
    source, out = table(world / "data" / "bad.csv", names, prompt=[*[PROMPT] * 14, ""]), tmp_path / "out.jsonl"
    command = ["predict", str(run), "--data", str(source), "--out", str(out), "--json"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "2 of 15 samples cannot be used" in said and "torn.png" in said and len(lines(out)) == 13
    table(source, names[:14], prompt=[PROMPT] * 14)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["bad_samples"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "x.csv"], "--out names the file of the answers"),
        (["--data", "x.csv", "--out", "o", "--text", "a"], "--text asks about one sample"),
        (["--data", "x.csv", "--out", "."], "is a folder"),
        (["--data", "none.csv", "--out", "o"], "none.csv"),
    ],
)
def test_what_does_not_go_together_is_said(run, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(run), *arguments]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_python_takes_lists_arrays_bytes_and_pictures(run, images):
    predictor = Pretrained(runs.open_run(run))
    alone = [predictor.predict(path, PROMPT) for path in images[:4]]
    with Image.open(images[1]) as picture:
        given = [
            images[0],
            picture.convert("RGB"),
            np.asarray(Image.open(images[2]).convert("RGB")),
            images[3].read_bytes(),
        ]
    found = predictor.predict([{"image": one, "text": PROMPT} for one in given])
    for one, other in zip(found, alone, strict=True):
        assert one["answer"] == other["answer"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)
    assert [one["image"] for one in found] == [str(images[0]), None, None, None]
    assert predictor.predict([]) == []
    with pytest.raises(DataError, match="image: a array of float64 is no image file"):
        predictor.predict(np.zeros((4, 4, 3)), PROMPT)


def test_python_fetches_what_has_an_address(run, images, monkeypatch):
    served = functools.partial(SimpleHTTPRequestHandler, directory=images[0].parent)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    predictor = Pretrained(runs.open_run(run))
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{images[0].name}"
        found = predictor.predict(address, PROMPT)
        assert found == {**predictor.predict(images[0], PROMPT), "image": address}
        with pytest.raises(DataError, match=r"nothing.png' cannot be fetched \(HTTP Error 404.*\): give a file"):
            predictor.predict(address.replace(images[0].name, "nothing.png"), PROMPT)
        monkeypatch.setattr(export, "FETCHED", 10)
        with pytest.raises(DataError, match="holds more than 0 MiB"):
            predictor.predict(address, PROMPT)
        server.shutdown()


def test_eval_writes_every_prediction(world, run, tmp_path, capsys):
    out = tmp_path / "predictions.jsonl"
    metrics, found = as_json(capsys, "eval", run, "--split", "test", "--out", out), lines(out)
    assert len(found) == metrics["samples"] and {
        "id",
        "image",
        "prompt",
        "answer",
        "predicted",
        "probabilities",
    } <= set(found[0])
    assert np.mean([line["correct"] for line in found]) == metrics["accuracy"]
    assert main(["eval", str(run), "--split", "test", "--out", str(out)]) == 2
    assert "exists: give a new file for the predictions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mask", [np.eye(3, 5) > 0, np.ones((2, 3), bool), np.zeros((4, 1), bool), np.arange(6).reshape(2, 3) < 3]
)
def test_run_lengths_give_the_mask_again(mask):
    coded = encode_mask(mask)
    assert coded["size"] == list(mask.shape) and np.array_equal(decode_mask(coded, mask.shape), mask)


def test_masks_are_written_as_run_lengths(world, images, tmp_path):
    opened = runs.open_run(make_run(world, "segment"))
    source = table(world / "data" / "segment.csv", images[:2], expression=["red square"] * 2)
    bulk.predict_rows(opened, source, tmp_path / "masks.jsonl")
    for line, path in zip(lines(tmp_path / "masks.jsonl"), images, strict=False):
        mask = scoring.ask(opened, {"image": path}, "red square").mask
        assert np.array_equal(decode_mask(line["mask"], mask.shape), mask) and line["expression"] == "red square"


def test_files_of_a_table_that_lies_elsewhere_are_those_of_the_runs_data(run, images, tmp_path, world):
    outs = []
    for folder in (world / "data", tmp_path):
        source = table(folder / "beside.csv", images, prompt=[PROMPT] * 6)
        out = tmp_path / f"{folder.name}.jsonl"
        assert main(["predict", str(run), "--data", str(source), "--out", str(out)]) == 0
        outs.append([{**line, "id": 0} for line in lines(out)])
    assert len(outs[0]) == 6 and outs[0] == outs[1]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / images[0].name)  # its own are taken first
    assert main(["predict", str(run), "--data", str(source), "--out", str(tmp_path / "own.jsonl")]) == 0
    assert lines(tmp_path / "own.jsonl")[0]["probabilities"] != outs[0][0]["probabilities"]
