"""Two methods, two seeds, real training of tiny models: rows, resume, and the judged claim, through the command line."""

import json
from types import SimpleNamespace

import pytest
import yaml
from commands import as_json
from folders import as_label, colour_world, rewrite, run_settings
from PIL import Image

from benchmarks.claims import ledger
from benchmarks.claims.claim import Conditions, claim
from benchmarks.claims.rows import Rows, mean
from mitrain.cli import main
from mitrain.compare import compare, processes, worker
from mitrain.compare.intervals import outcomes_of


@claim("MiT sees", expected="better than the text alone", data="colours")
def tiny(rows: Rows, found: SimpleNamespace) -> Conditions:
    found.gain = mean(rows.of("mit"), "value") - mean(rows.of("none"), "value")
    return Conditions(confirmed=found.gain > 0.3, contradicted=found.gain < 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("compare"), train=24, val=8, width=48) as path:
        base = run_settings(
            path,
            vision={"layer": 2, "pool": "cls+mean"},
            name="labels",
            adapter={"name": "mit", "layers": [1, 2]},
            task={"name": "classify"},
            data={"name": "labelled", "root": str(path / "data"), "splits": rewrite(path / "data", as_label, "labels-")},
            train={
                "steps": 30, "batch": 12, "lr": 1e-2, "eval_every": 15, "save_every": 15,
                "schedule": {"name": "cosine", "warmup": 3},
            },
        )  # fmt: skip
        (path / "base.yaml").write_text(yaml.safe_dump(base))
        study = {
            "name": "tiny",
            "tasks": {"label": {"config": "base.yaml", "metric": "accuracy", "split": "test"}},
            "methods": {"mit": {}, "none": {"adapter": {"name": "none"}}},
            "seeds": [0, 1],
            "panels": 2,
        }
        (path / "tiny.yaml").write_text(yaml.safe_dump(study))
        yield path


def here(own_process=()):
    """Runs a cell's worker in this process, but those named in one of their own; counts what was run."""
    ran = []

    def run(command, said, limit_s, beat):
        folder = said.parent
        ran.append(folder.name)
        if folder.name in own_process:
            return real(command, said, limit_s, beat=beat)
        return worker.main(folder)

    real = processes.run
    return run, ran


def test_a_comparison_from_end_to_end(world, capsys, monkeypatch):
    out = world / "results" / "tiny"
    run, ran = here(own_process=["label-mit-seed0"])
    monkeypatch.setattr(processes, "run", run)
    rows = as_json(capsys, "compare", world / "tiny.yaml", "--out", out)["rows"]
    assert [(r["method"], r["seed"], r["status"]) for r in rows] == [
        ("mit", 0, "ok"), ("mit", 1, "ok"), ("none", 0, "ok"), ("none", 1, "ok"),
    ]  # fmt: skip
    mit, none = rows[0], rows[2]
    assert min(rows[0]["value"], rows[1]["value"]) >= 0.8 and max(rows[2]["value"], rows[3]["value"]) <= 0.5
    assert mit["controls"]["other-inputs"] <= 0.5 and mit["controls"]["majority label"] == 0.25
    for row in (mit, none):
        kept = outcomes_of([row]), outcomes_of([row], "other-inputs")
        assert kept[0].estimate.value == row["value"] and kept[1].estimate.value == row["controls"]["other-inputs"]
    assert (kept[0] - kept[1]).estimate.least == 0, "without an adapter no sample's answer depends on its picture"
    assert none["trainable_parameters"] == none["head_parameters"] == 4 * (48 + 1)
    assert mit["trainable_parameters"] > none["trainable_parameters"]
    assert mit["frozen_parameters"] == none["frozen_parameters"]
    assert mit["peak_bytes"] == sum(mit["bytes"].values()) > none["peak_bytes"]
    assert mit["bytes"]["gradients"] == 4 * mit["trainable_parameters"]
    assert mit["bytes"]["optimizer"] >= 8 * mit["trainable_parameters"]
    assert mit["saved_bytes"] > none["saved_bytes"] > 0 and mit["flops_per_sample"] > none["flops_per_sample"] > 0
    assert mit["step_ms"] > 0 and mit["adapter_bytes"] > 4 * mit["trainable_parameters"]
    for method in ("mit", "none"):
        with Image.open(out / "predictions" / f"label-{method}.png") as sheet:
            assert sheet.width > 200 and sheet.height > 200
    assert not list((out / "cells").iterdir())
    assert len(list((out / "baselines").iterdir())) == 1, "computed once for both methods and seeds"
    assert ran == ["label-mit-seed0", "label-mit-seed1", "label-none-seed0", "label-none-seed1"]
    ran.clear()
    more = as_json(capsys, "compare", world / "tiny.yaml", "--out", out, "--seeds", "2", "--only", "none")["rows"]
    assert ran == ["label-none-seed2"] and len(more) == 5
    (row,) = ledger.ledger([tiny], world / "results", world)["rows"]
    assert row["verdict"] == "confirmed" and row["measured"]["gain"] > 0.3 and len(row["cells"]) == 5


@pytest.mark.parametrize(
    ("asked", "reason", "trained"),
    [
        ({"metric": "acuracy"}, "'acuracy' is no metric", 1),
        ({"split": "tset"}, "'tset'", 0),
        ({"controls": ["other-text"]}, "one text makes up more than half", 0),
    ],
)
def test_a_cell_that_cannot_be_measured_is_a_row(world, capsys, monkeypatch, tmp_path, asked, reason, trained):
    """A split that is not there, or a control that cannot be, is found before the training."""
    run, _ = here()
    monkeypatch.setattr(processes, "run", run)
    fitted, fit = [], worker.Trainer.fit
    monkeypatch.setattr(worker.Trainer, "fit", lambda self: fitted.append(self) or fit(self))
    values = yaml.safe_load((world / "tiny.yaml").read_text()) | {
        "seeds": [0],
        "methods": {"none": {"adapter": {"name": "none"}}},
    }
    values["tasks"]["label"] |= asked
    path = world / "wrong.yaml"
    path.write_text(yaml.safe_dump(values))
    code = main(["compare", str(path), "--out", str(tmp_path / "out"), "--json"])
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["rows"]
    assert code == 1 and row["status"] == compare.FAILED and row["value"] is None
    assert reason in captured.err
    assert len(fitted) == trained
