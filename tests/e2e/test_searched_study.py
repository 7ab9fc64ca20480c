"""A study from its search to its table, with real runs of tiny models in this process."""

import json

import pytest
import yaml
from folders import own_cache
from methods_world import configured, make_world

from mitrain.compare import compare, study, worker
from mitrain.compare.intervals import outcomes_of
from mitrain.compare.search import Job

SPACE = {"none": {"train.head_lr": [1e-5, 3e-1]}}


def in_this_process(cell, folder, limit_s):
    assert worker.main(folder) == 0
    return {"status": "ok", "seconds": 1, **json.loads((folder / "row.json").read_text())}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("study"))
    asked = {"split": "test", "controls": [], "baselines": False}
    tasks = {task: {"config": str(configured(world, "none", task)), **asked} for task in ("classify", "retrieve")}
    tasks["classify"]["also_on"] = ["val"]
    methods = {"none": {}, "permuted": {"train.permute": True, "train.head_lr": 3e-1}}
    content = {
        "name": "tiny",
        "tasks": tasks,
        "methods": methods,
        "seeds": [0],
        "panels": 0,
        "set": {"train.steps": 12},
    }
    content["search"] = {"space": SPACE, "trials": 2, "rungs": [6], "set": {"train.eval_every": 6}}
    (world / "study.yaml").write_text(yaml.safe_dump(content))
    job = Job(study.read(world / "study.yaml"), world / "study.yaml", world / "out")
    with own_cache(world):
        return compare.compare(job, "mitrain compare", say=lambda _: None, measure=in_this_process), world / "out"


def test_rows_keep_what_each_test_sample_counted(found):
    result, out = found
    for row in result["rows"]:
        kept = outcomes_of([row])
        assert len(kept.by_seed[0]) == row["metrics"]["samples"]
        assert kept.estimate.value == pytest.approx(row["value"], abs=1e-6)
    assert (out / "table.md").read_text().count("[") >= len(result["rows"])


def test_another_split_stands_beside_the_score(found):
    rows = [row for row in found[0]["rows"] if row["task"] == "classify"]
    assert [list(row["controls"]) for row in rows] == [["on val"]] * 2
    assert all(0 <= row["controls"]["on val"] <= 1 for row in rows)


def test_the_rate_that_was_better_on_val_is_trained(found):
    result, out = found
    chosen = {one["task"]: one for one in result["search"]}
    assert chosen["classify"]["set"] == {"train.head_lr": 0.3}
    trials = json.loads((out / "search" / "classify-none-6" / "results.json").read_text())["rows"]
    assert chosen["classify"]["value"] == max(row["value"] for row in trials)


def test_labels_that_were_exchanged_teach_nothing(found):
    result, _ = found
    value = {row["method"]: row["value"] for row in result["rows"] if row["task"] == "classify"}
    assert value["none"] > value["permuted"]
