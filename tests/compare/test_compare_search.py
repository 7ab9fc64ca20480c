"""Settings chosen on val before a study's own cells are measured."""

import json
import sys

import pytest
import yaml
from studies import BASE, NUMBERS, STUDY

from mitrain.compare import compare, search, study
from mitrain.compare.compare import FAILED, OK
from mitrain.compare.search import Job
from mitrain.compare.table import table
from mitrain.core.errors import ConfigError

SPACE = {"mit": {"train.lr": [0.1, 0.2, 0.3, 0.4], "adapter.base": [0, 1]}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("mitrain.core.provenance.commit", lambda: "abc1234")


class Bench:
    """A run's score is its rate, the better the longer it trains; ``peak``: short runs are best at another rate."""

    def __init__(self, peak=None, fails=False):
        self.asked, self.peak, self.fails = [], peak, fails

    def __call__(self, cell, folder, limit_s):
        train = cell.config.train
        self.asked.append((cell.id.method, cell.part.split, train.steps, train.lr, cell.config.seed))
        if self.fails and cell.part.split == "val":
            return {"status": FAILED, "reason": "no room", "seconds": 1}
        value = 1 - abs(train.lr - self.peak) if self.peak and train.steps < 20 else train.lr
        return {"status": OK, "seconds": 3, **NUMBERS, "value": value}


def make(folder, metric="accuracy", of=BASE["task"], **changes):
    data = {"name": {"retrieve": "captions", "regress": "rated"}.get(of["name"], "labelled"), "root": "data"}
    (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, "task": of, "data": data}))
    search = {"space": SPACE, "rungs": [10, 20, 40], "trials": 8, "seed": 7, **changes}
    content = {**STUDY, "methods": {"mit": {}, "none": {"adapter": {"name": "none"}}}, "search": search}
    content["tasks"] = {"label": {"config": "base.yaml", "metric": metric, "split": "test"}}
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return Job(study.read(folder / "study.yaml"), folder / "study.yaml", folder / "out")


def run(job, bench, **options):
    return compare.compare(job, "mitrain compare x", say=lambda _: None, measure=bench, **options)


def test_the_better_half_goes_on_and_the_best_is_trained_for_test(tmp_path):
    bench = Bench()
    found = run(make(tmp_path), bench)
    trials = [ask for ask in bench.asked if ask[1] == "val"]
    assert [steps for _, _, steps, _, _ in trials] == [10] * 8 + [20] * 4 + [40] * 2
    assert {ask[0] for ask in trials} == {"mit"} and {ask[4] for ask in trials} == {7}
    assert {lr for _, _, steps, lr, _ in trials if steps == 20} == {0.3, 0.4}
    final = [ask for ask in bench.asked if ask[1] == "test"]
    assert final == [("mit", "test", 5, 0.4, 0), ("mit", "test", 5, 0.4, 1)] + [("none", "test", 5, 1e-3, s) for s in (0, 1)]
    (chosen,) = found["search"]
    assert chosen["set"] == {"train.lr": 0.4, "adapter.base": 0} and chosen["value"] == 0.4
    assert (chosen["trials"], chosen["steps"], chosen["seconds"]) == (14, 8 * 10 + 4 * 20 + 2 * 40, 42)
    assert [row["method"] for row in found["rows"]] == ["mit", "mit", "none", "none"]
    assert "| label | mit | adapter.base=0 train.lr=0.4 | accuracy 0.400 | 14 | 240 | 1 |" in table(found)


def test_what_is_best_in_a_short_run_alone_is_not_chosen(tmp_path):
    chosen = run(make(tmp_path), Bench(peak=0.25))["search"][0]["set"]
    assert chosen["train.lr"] == 0.3, "0.2 and 0.3 go on, and the longer runs decide"


def test_a_search_may_choose_by_another_metric_and_on_fewer_samples_than_the_table(tmp_path):
    own = make(tmp_path, metric="samples", samples=7).study
    own = own.model_copy(update={"search": own.search.model_copy(update={"metric": "majority"})})
    part = search.trials_of(own, "label", "mit", 10, {"one": {"train.lr": 0.1}}).tasks["label"]
    assert (part.split, part.metric, part.samples) == ("val", "majority", 7)
    assert (own.tasks["label"].split, own.tasks["label"].metric, own.tasks["label"].samples) == ("test", "samples", None)


def test_an_interrupted_search_goes_on_and_a_finished_one_is_not_repeated(tmp_path):
    job, bench = make(tmp_path), Bench()
    first = run(job, bench)
    again = Bench()
    assert run(job, again)["rows"] == first["rows"] and again.asked == []
    path = tmp_path / "out" / "search" / "label-mit-40" / "results.json"
    kept = json.loads(path.read_text())
    kept["rows"] = kept["rows"][:-1]
    path.write_text(json.dumps(kept))
    run(job, again)
    assert [ask[1:3] for ask in again.asked] == [("val", 40)]


@pytest.mark.parametrize("samples", [None, 5])
def test_trials_are_scored_on_as_many_samples_of_val_as_the_search_says(tmp_path, samples):
    job = make(tmp_path, samples=samples)
    part = job.study.tasks["label"].model_copy(update={"samples": 9})
    found = search.trials_of(job.study.model_copy(update={"tasks": {"label": part}}), "label", "mit", 10, {"point": {}})
    assert found.tasks["label"].samples == (samples or 9) and found.tasks["label"].split == "val"


def test_a_method_whose_trials_all_fail_has_no_row_and_the_others_go_on(tmp_path):
    found = run(make(tmp_path), Bench(fails=True))
    assert {row["method"] for row in found["rows"]} == {"none"} and "search" not in found
    assert found["missing"] == ["label-mit"]
    with pytest.raises(compare.CompareError, match="no trial of a round went through, .* for label mit: see"):
        compare.check(found)


def test_a_search_for_one_method_leaves_the_rows_of_the_others(tmp_path):
    job = make(tmp_path, space={**SPACE, "none": {"train.lr": [0.1, 0.2], "seed": [1, 2, 3, 4]}})
    some = run(job, Bench(), only=["mit"])
    assert {row["method"] for row in some["rows"]} == {"mit"}
    assert some["missing"] == ["label-none"]
    both = run(job, Bench(), only=["none"])
    assert [row["method"] for row in both["rows"]] == ["mit", "mit", "none", "none"] and not both["missing"]
    assert [one["method"] for one in both["search"]] == ["mit", "none"]


def test_before_the_search_nothing_is_listed_that_it_has_not_chosen(tmp_path):
    job = make(tmp_path)
    first, *cells = compare.listed(job, None, ())
    assert (first["cell"], first["done"], first["seconds"]) == ("label-mit, search on val", False, 14 * 240)
    assert {entry["method"] for entry in cells} == {"none"} and len(compare.listed(job, None, ["none"])) == 2
    run(job, Bench())
    assert [entry["done"] for entry in compare.listed(job, None, ())] == [True] * 4


def test_a_large_grid_is_drawn_from(tmp_path):
    bench = Bench()
    run(make(tmp_path, trials=3, rungs=[10]), bench, only=["mit"])
    drawn = [ask[3] for ask in bench.asked if ask[1] == "val"]
    assert len(drawn) == 3
    assert drawn == [0.2, 0.4, 0.2], "from the search's seed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 9}, "the grid of mit has 8 points, fewer than trials=9: every method is given the same budget"),
        ({"rungs": [20, 10]}, "rungs=[20, 10] must rise"),
        (
            {"space": {"mitt": SPACE["mit"]}},
            "search names the method 'mitt' (did you mean 'mit'?), which the study has not",
        ),
        ({"space": {"mit": {}}}, "the grid of mit has 0 points"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, changes, words):
    with pytest.raises(ConfigError) as error:
        make(tmp_path, **changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("metric", "task", "best"),
    [
        ("i2t_median_rank", {"name": "retrieve"}, 0.1),
        ("i2t_r1", {"name": "retrieve"}, 0.4),
        ("mae", {"name": "regress", "metric": "scores:gap"}, 0.1),
        (None, {"name": "classify", "metric": "scores:gap"}, 0.1),
        ("accuracy", {"name": "classify", "metric": "scores:gap"}, 0.4),
    ],
)
def test_of_what_is_best_where_it_is_least_the_least_is_chosen(tmp_path, monkeypatch, metric, task, best):
    (tmp_path / "scores.py").write_text("def gap(samples, predictions):\n    return 0.0\ngap.minimises = True\n")
    monkeypatch.setenv("MITRAIN_TRUST_CODE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scores", raising=False)
    job = make(tmp_path, metric=metric, of=task)
    assert run(job, Bench(), only=["mit"])["search"][0]["set"]["train.lr"] == best


def test_trials_of_a_study_that_was_changed_are_not_believed(tmp_path):
    run(make(tmp_path), Bench())
    changed = make(tmp_path, of={"name": "classify", "dropout": 0.5})
    some = run(changed, Bench(), only=["none"])
    assert "search" not in some and {row["method"] for row in some["rows"]} == {"none"}
    assert compare.listed(changed, None, ())[0]["cell"] == "label-mit, search on val"


def test_damaged_trials_are_not_believed(tmp_path):
    job = make(tmp_path)
    run(job, Bench())
    path = tmp_path / "out" / "search" / "label-mit-40" / "results.json"
    path.write_text(path.read_text().replace('"at"', '"place"'))
    assert compare.listed(job, None, ())[0]["cell"] == "label-mit, search on val"


def test_a_value_that_stands_twice_is_one_point(tmp_path):
    job = make(tmp_path, space={"mit": {"train.lr": [0.1, 0.1, 0.1, 0.2]}}, trials=2, rungs=[10])
    bench = Bench()
    run(job, bench, only=["mit"])
    assert [ask[3] for ask in bench.asked if ask[1] == "val"] == [0.1, 0.2]
