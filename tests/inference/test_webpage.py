"""RUN/report.html: one file that holds what was logged and scored, and asks nobody else for anything."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
import yaml
from commands import as_json
from folders import as_label, colour_world, rewrite, run_settings

from mitrain.cli import main
from mitrain.training import curves


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run of classify on pictures of a colour, whose last class is called like markup."""
    with colour_world(tmp_path_factory.mktemp("webpage"), train=24, val=8, width=48) as path:
        rewrite(path / "data", lambda row: as_label(row) | {"label": f"<{row['answer']}>"})
        config = run_settings(
            path,
            name="colours",
            adapter={"name": "mit", "layers": [1, 2]},
            task={"name": "classify"},
            data={"name": "labelled", "root": str(path / "data")},
            train={"steps": 6, "batch": 12, "eval_every": 2, "save_every": 6},
        )
        (path / "run.yaml").write_text(yaml.safe_dump(config))
        assert main(["train", str(path / "run.yaml"), "--run-dir", str(path / "run")]) == 0
        yield path


class Read(HTMLParser):
    """The tables' cells, the headings and every address."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.heads, self.addresses, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.rows += [[]] if tag == "tr" else []

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1].append(data)
        elif self.inside == "h2":
            self.heads.append(data)

    def handle_endtag(self, tag):
        self.inside = ""


def alone(read: Read) -> bool:
    return all(address.startswith(("data:", "#")) for address in read.addresses)


def test_training_leaves_a_page_of_what_it_logged(world):
    pytest.importorskip("matplotlib")
    text = (world / "run/report.html").read_text()
    read = Read(text)
    assert read.heads == ["Training", "Val during training"] and alone(read)
    val = [line for line in curves.logged(world / "run") if line["kind"] == "val"]
    column = read.rows[0].index("accuracy")
    assert [row[column] for row in read.rows[1:4]] == [f"{line['accuracy']:.4f}" for line in val]
    svg = (world / "run/curves.svg").read_text()
    assert svg[svg.index("<svg") :] in text and "accuracy on val" in svg
    assert "name: colours" in text and "done (last step)" in text


def test_without_matplotlib_one_line_says_so_and_the_run_is_whole(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ("train.steps=1", "train.eval_every=1", "train.save_every=1")
    assert main(["train", str(world / "run.yaml"), "--run-dir", str(tmp_path / "run"), *words]) == 0
    assert [r.getMessage() for r in caplog.records if "curves" in r.getMessage()] and "mitrain[plots]" in caplog.text
    text = (tmp_path / "run/report.html").read_text()
    assert "<svg" not in text and Read(text).heads == ["Val during training"]
    assert not (tmp_path / "run/curves.svg").exists()


def test_a_report_adds_controls_classes_and_samples(world, capsys):
    pytest.importorskip("matplotlib")
    results = as_json(capsys, "report", world / "run")
    scored = as_json(capsys, "eval", world / "run", "--split", "test")
    text = (world / "run/report.html").read_text()
    read = Read(text)
    assert alone(read) and "<red>" not in text and "&lt;red&gt;" in text, "names are text, not markup"
    rows = {(row["split"], row["label"]): f"{row['mean']['accuracy']:.3f}" for row in results["rows"]}
    assert len(rows) > 3 and ("test", "colours, another sample's image") in rows
    assert [(r[0], r[1], r[2]) for r in read.rows if r[0] == "test"] == [(*key, value) for key, value in rows.items()]
    for name, row in scored["per_class"].items():
        shown = [name, *("–" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values())]
        assert shown in read.rows
    counts = scored["confusion"]["counts"]
    assert sum(map(sum, counts)) == scored["samples"] and scored["confusion"]["classes"] == list(scored["per_class"])
    right = sum(row[i] for i, row in enumerate(counts))
    assert right == round(scored["accuracy"] * scored["samples"])
    assert len(re.findall('<figure class="right">', text)) == min(16, right)
    assert len(re.findall('<figure class="wrong">', text)) == min(16, scored["samples"] - right)
    assert text.count("data:image/jpeg;base64,") == min(16, right) + min(16, scored["samples"] - right)


def test_eval_prints_a_line_for_each_class(world, capsys):
    assert main(["eval", str(world / "run"), "--split", "test"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == ["class", "precision", "recall", "F1", "samples"])
    assert all(line.startswith("<") and len(line.split()) == 5 for line in lines[head + 1 :]) and len(lines) > head + 1
    assert not any("confusion" in line for line in lines)


def test_several_runs_need_a_folder(world, capsys):
    assert main(["report", str(world / "run"), str(world / "run")]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_long_run_is_drawn_by_its_means():
    points = [(step, float(step % 2)) for step in range(1, 10_001)]
    drawn = curves.smoothed(points)
    assert len(drawn) <= curves.MOST_POINTS and all(value == 0.5 for _, value in drawn) and drawn[-1][0] == 10_000
    assert curves.smoothed(points[:5]) == points[:5]


def test_a_run_folder_and_its_data_in_another_place_are_scored_alike(world, tmp_path, capsys):
    def scored(*words):
        capsys.readouterr()
        code = main(["eval", *map(str, words), "--split", "test", "--json"])
        printed = capsys.readouterr()
        return {k: v for k, v in json.loads(printed.out).items() if k != "run"} if not code else printed.err

    before = scored(world / "run")
    run = tmp_path / "elsewhere" / "run"  # beside one another both would be found
    shutil.copytree(world / "run", run)
    (world / "data").rename(tmp_path / "data")
    try:
        assert "is not there: give the data's folder with --data" in scored(run)
        assert scored(run, "--data", tmp_path / "data") == before
    finally:
        (tmp_path / "data").rename(world / "data")
