"""The ledger: verdicts follow from rows, whatever is missing is said, and a changed number flips them."""

import json
import math
from types import SimpleNamespace

import pytest
import yaml
from source_tree import ROOT
from studies import BASE, NUMBERS, STUDY

from benchmarks.claims import ledger, rows
from benchmarks.claims.claim import Conditions, claim
from benchmarks.claims.rows import Missing, Rows, difference
from benchmarks.command import main
from mitrain.compare import cells, study
from mitrain.compare.intervals import kept
from mitrain.core.errors import ConfigError

METHODS = {"mit": {}, "none": {"adapter": {"name": "none"}}}


@claim("MiT | sees", expected="more than nothing", data="colours")
def x1(rows: Rows, found: SimpleNamespace) -> Conditions:
    mit, none = rows.of("mit"), rows.of("none")
    found.gain = difference(mit, none)
    return Conditions(confirmed=found.gain.low > 0, contradicted=found.gain.high < 0)


@pytest.fixture
def world(tmp_path):
    """A folder with a study of two methods and two seeds."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "x1.yaml").write_text(yaml.safe_dump({**STUDY, "name": "x1", "methods": METHODS}))
    return tmp_path


def results(world, values, **changes):
    """Result rows of the study as a measurement leaves them; ``values``: {(method, seed): value}."""
    found, out = study.read(world / "x1.yaml"), []
    for place in cells.cell_ids(found, sorted({seed for _, seed in values})):
        if (place.method, place.seed) in values:
            cell = cells.resolve(found, world / "x1.yaml", place)
            row = {"task": place.task, "method": place.method, "axis": None, "at": None, "seed": place.seed, **NUMBERS}
            row |= {"status": "ok", "reason": None, "reduced": None, "digest": cell.digest}
            out.append({**row, "value": values[place.method, place.seed], **changes})
    path = world / "results" / "x1" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": out}))
    return path


GOOD = {("mit", 0): 0.8, ("mit", 1): 0.9, ("none", 0): 0.41, ("none", 1): 0.49}


def judged(world, wanted=x1):
    (row,) = ledger.ledger([wanted], world / "results", world)["rows"]
    return row


def verdict(world):
    row = judged(world)
    return row["verdict"], row["reason"]


def test_a_changed_result_flips_the_verdict(world):
    path = results(world, GOOD)
    assert verdict(world) == ("confirmed", "")
    document = json.loads(path.read_text())
    for row in document["rows"]:
        if row["method"] == "none":
            row["value"] += 0.8
    path.write_text(json.dumps(document))
    assert verdict(world) == ("contradicted", "")
    document["rows"][0]["value"] = 1.1
    path.write_text(json.dumps(document))
    assert verdict(world)[0] == "not seen at this scale"


def test_reduced_runs_contradict_nothing(world):
    """A short run on small pictures is no test of a paper's claim, whatever it gives; it can still show the effect."""
    results(world, GOOD, reduced="60 steps")
    assert verdict(world) == ("confirmed", "")
    results(world, {key: 1 - value for key, value in GOOD.items()}, reduced="60 steps")
    row = judged(world)
    assert row["verdict"] == "not seen at this scale" and "runs too small to contradict" in row["reason"]


def test_what_was_not_seen_says_the_smallest_effect_that_could_have_been(world):
    results(world, {("mit", 0): 0.5, ("mit", 1): 0.6, ("none", 0): 0.5, ("none", 1): 0.5})
    row = judged(world)
    half = 12.706204736 * 0.1 / math.sqrt(2) / math.sqrt(2)  # t of one degree of freedom, standard error of two pairs
    assert row["smallest_effect_seen"] == pytest.approx(half)
    assert row["interval"]["gain"] == pytest.approx([0.05 - half, 0.05 + half])
    assert row["verdict"] == "not seen at this scale" and row["reason"].endswith("below 0.6353 could not have been seen")


def test_sides_that_score_the_same_everywhere_tell_of_no_effects_size(world):
    results(world, dict.fromkeys(GOOD, 0.5))
    row = judged(world)
    assert row["verdict"] == "not seen at this scale" and row["smallest_effect_seen"] is None
    assert row["reason"].endswith("of gain nothing can be said: both sides scored the same in every sample and seed")


def test_the_rows_fields(world):
    results(world, GOOD)
    row = judged(world)
    assert row["measured"] == {"gain": pytest.approx(0.4)}
    assert row["cells"] == ["label-mit-seed0", "label-mit-seed1", "label-none-seed0", "label-none-seed1"]
    assert row["rule"].endswith("return Conditions(confirmed=found.gain.low > 0, contradicted=found.gain.high < 0)")
    assert row["result_file"].endswith("results/x1/results.json")
    assert row["command"].startswith("mitrain compare ") and row["command"].endswith("results/x1")
    assert (row["claim"], row["expected"]) == ("X1", "more than nothing")


def test_what_is_missing_leaves_the_claim_untested_and_is_said(world):
    assert verdict(world) == ("not tested", "label mit seed 0: not measured")
    results(world, {key: value for key, value in GOOD.items() if key != ("none", 1)})
    assert verdict(world) == ("not tested", "label none seed 1: not measured")
    results(world, GOOD, status="too long", reason="not finished after 240 s")
    assert verdict(world) == ("not tested", "label mit seed 0: too long (not finished after 240 s)")
    results(world, GOOD, value=None)
    assert verdict(world)[1] == "label mit seed 0: no number 'value'"


def test_rows_of_other_settings_do_not_count(world):
    results(world, GOOD, digest="0" * 12)
    assert verdict(world) == ("not tested", "label mit seed 0: measured for other settings")


def test_a_further_seed_counts_where_it_was_measured(world):
    results(world, GOOD | {("mit", 3): 0.7, ("none", 3): 0.6})
    row = judged(world)
    assert row["measured"]["gain"] == pytest.approx(0.3) and "label-mit-seed3" in row["cells"]
    results(world, GOOD | {("mit", 3): 0.7})
    row = judged(world)
    assert row["verdict"] == "not tested" and "other seeds" in row["reason"]


def test_a_method_that_is_not_known_here_leaves_its_claim_untested(world):
    results(world, GOOD)
    methods = {**METHODS, "mit": {"adapter": {"name": "later"}}}
    (world / "x1.yaml").write_text(yaml.safe_dump({**STUDY, "name": "x1", "methods": methods}))
    assert "not known here" in verdict(world)[1] and "'later' is not known" in verdict(world)[1]


def test_a_claim_reads_the_rows_of_another_study(world):
    @claim("t", expected="e", data="d", study="x1")
    def other(rows: Rows, found: SimpleNamespace) -> Conditions:
        return Conditions(confirmed=len(rows.of("mit")) == 2, contradicted=False)

    results(world, GOOD)
    (job,) = ledger.jobs([other, x1], world / "results", world)
    assert job.out.name == "x1"
    assert ledger.verdict(other, Rows(ledger.expected(job)))[0] == "confirmed"


def test_conditions_that_both_hold_are_the_claims_fault():
    @claim("t", expected="e", data="d")
    def both(rows: Rows, found: SimpleNamespace) -> Conditions:
        return Conditions(confirmed=True, contradicted=True)

    with pytest.raises(ConfigError, match="BOTH is confirmed and contradicted"):
        ledger.verdict(both, Rows([]))


def test_a_quotient_of_nothing_leaves_the_claim_untested():
    @claim("t", expected="e", data="d")
    def empty(rows: Rows, found: SimpleNamespace) -> Conditions:
        found.before = 1.0
        found.share = 1 / 0.0
        return Conditions(confirmed=True, contradicted=False)

    assert ledger.verdict(empty, Rows([])) == ("not tested", "float division by zero", {"before": 1.0})


def test_the_table_is_markdown(world):
    results(world, GOOD, reduced="60 steps")
    text = ledger.table({"rows": [judged(world)]})
    (line,) = [line for line in text.splitlines() if line.startswith("| X1 ")]
    assert "| MiT &#124; sees | more than nothing | gain 0.4 (0.2729 to 0.5271) | **confirmed**: 60 steps |" in line
    assert line.count("|") == 8


def test_the_command(tmp_path, capsys):
    assert main(["ledger", "--quick", "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert json.loads((tmp_path / "ledger.json").read_text())["rows"] == found
    committed = ROOT / "docs" / "results" / "ledger" / "ledger.md"
    assert (tmp_path / "ledger.md").read_text() == committed.read_text(), "judge again: mitrain bench ledger --out …"


def test_results_that_are_not_there_leave_all_untested(tmp_path, capsys):
    assert main(["ledger", "--results", str(tmp_path), "--json"]) == 0
    assert {row["verdict"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"not tested"}


def test_measuring_takes_the_counted_studies_alone_when_it_is_to_be_quick(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ledger, "compare", lambda job, command, say: asked.append(job.study.name) or {"rows": []})
    assert main(["ledger", "--measure", "--quick", "--results", str(tmp_path)]) == 0
    assert asked == ["m1", "m2", "m3", "p1", "c1", "a1"]
    assert main(["ledger", "--measure", "--results", str(tmp_path)]) == 0
    assert asked[6:] == ["m1", "m2", "m3", "m4", "p1", "p2", "p3", "p4", "c1", "c2", "c3", "c4", "c5", "a1",
                         "retrieval", "a3", "a4"]  # fmt: skip


def test_the_committed_verdicts_are_those_of_the_committed_rows():
    """Nobody typed them, and nobody forgot to judge again."""
    committed = json.loads((ROOT / "docs" / "results" / "ledger" / "ledger.json").read_text())["rows"]
    judged = ledger.ledger()["rows"]
    numbers = [[row.pop("measured") for row in several] for several in (committed, judged)]
    assert committed == judged
    for one, other in zip(*numbers, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-9, abs=1e-12), "Pythons add in another order"


# What rows look like to claims


def row(method, seed=0, value=0.5, axis=None, at=None, task="t", status="ok", **more):
    place = {"task": task, "method": method, "axis": axis, "at": at, "seed": seed}
    return {**place, "status": status, "reason": None, "value": value, **more}


ROWS = [
    row("a", 0, 0.6, controls={"no-image": 0.2}), row("a", 1, 0.8, controls={"no-image": 0.4}),
    row("a", 2, 0.7, controls={"no-image": 0.3}),
    row("b", 0, 0.5), row("b", 1, 0.9), row("b", 2, 0.4),
    *[row("m", seed, 0.1 * k + 0.01 * seed, "experts", k) for k in (1, 2, 4) for seed in (0, 1)],
    row("lost", 0, 0.5), row("lost", 1, None, status="too long"), row("odd", 0, math.nan), row("odd", 1, True),
    row("two", task="t"), row("two", task="u"), row("alone"),
]  # fmt: skip


def test_what_each_gives():
    found = Rows(ROWS)
    a, b, points = found.of("a"), found.of("b"), found.along("experts", "m")
    assert rows.mean(a, "value") == pytest.approx(0.7)
    assert rows.mean(a, "controls.no-image") == pytest.approx(0.3)
    assert rows.mean(found.of("m", "experts", 4), "value") == pytest.approx(0.405)
    assert rows.series(points, "value") == pytest.approx([0.105, 0.205, 0.405])
    assert rows.series(points, "at") == [1, 2, 4]
    gain = rows.difference(a, b)  # of 0.1, -0.1 and 0.3, whose standard deviation is 0.2
    assert gain.value == pytest.approx(0.1) and gain.least == pytest.approx(4.30265273 * 0.2 / math.sqrt(3))
    assert gain.low == pytest.approx(gain.value - gain.least) and gain.high == pytest.approx(gain.value + gain.least)
    assert rows.fit([1, 2, 3], [1, 2, 3]) == pytest.approx(1) and rows.fit([1, 2, 3], [1, 3, 2]) == pytest.approx(0.25)
    assert rows.fit([1, 2], [5, 5]) == 1
    assert rows.rises([1, 2, 3]) and not rows.rises([1, 3, 2]) and not rows.rises([1, 1, 2])
    assert [row["seed"] for row in found.of("two", task="u")] == [0]


def test_a_few_test_samples_make_an_interval_wide_whatever_the_seeds_say():
    counted = {"metrics": {"samples": 100.0}}
    some = [row(name, seed, value, **counted) for name, value in (("a", 0.6), ("b", 0.5)) for seed in (0, 1, 2)]
    found = rows.difference(Rows(some).of("a"), Rows(some).of("b"))
    assert found.value == pytest.approx(0.1)
    assert found.least == pytest.approx(1.96 * math.sqrt((0.6 * 0.4 + 0.5 * 0.5) / 100))


def test_outcomes_that_were_kept_make_a_difference_of_the_same_samples_narrow():
    ids = [str(i) for i in range(100)]
    some = [
        row(
            name,
            seed,
            share,
            outcomes=kept(ids, [1.0] * count + [0.0] * (100 - count), share),
            metrics={"samples": 100},
        )
        for name, count, share in (("a", 60, 0.6), ("b", 50, 0.5))
        for seed in (0, 1, 2)
    ]
    found = rows.difference(Rows(some).of("a"), Rows(some).of("b"))
    assert found.value == pytest.approx(0.1) and 0.04 < found.least < 0.075, "1.96 sqrt(.1 * .9 / 100) is .059"
    without = [{**r, "outcomes": None} for r in some]
    assert rows.difference(Rows(without).of("a"), Rows(without).of("b")).least > 0.13


def test_a_drop_under_a_control_is_taken_sample_by_sample_where_both_were_kept():
    ids = [str(i) for i in range(100)]
    own, other = kept(ids, [1.0] * 60 + [0.0] * 40, 0.6), kept(ids, [0.0] * 10 + [1.0] * 50 + [0.0] * 40, 0.5)
    held = {"controls": {"other-text": 0.5}, "outcomes": own, "control_outcomes": {"other-text": other}}
    some = [row("a", seed, 0.6, **held, metrics={"samples": 100}) for seed in (0, 1, 2)]
    drop = lambda found: (rows.scores(found) - rows.scores(found, "controls.other-text")).estimate  # noqa: E731
    assert drop(some).value == pytest.approx(0.1) and 0.04 < drop(some).least < 0.075
    for left in ({}, None, "x", {"shuffle": other}):
        assert drop([{**one, "control_outcomes": left} for one in some]).least > 0.13


def test_rows_remember_which_were_read():
    found = Rows(ROWS)
    found.of("b"), found.of("b"), found.of("alone")
    assert [(r["method"], r["seed"]) for r in found.read] == [("b", 0), ("b", 1), ("b", 2), ("alone", 0)]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda r: r.of("c"), "no row with method=c"),
        (lambda r: r.of("c", task="u"), "no row with method=c, task=u"),
        (lambda r: r.of("m", "experts", 3), "no row with method=m, experts=3"),
        (lambda r: r.of("m"), "no row with method=m"),
        (lambda r: r.along("length", "m"), "no row with method=m, over=length"),
        (lambda r: rows.mean(r.of("lost"), "value"), "t lost seed 1: too long"),
        (lambda r: rows.mean(r.of("odd")[:1], "value"), "t odd seed 0: no number 'value'"),
        (lambda r: rows.mean(r.of("odd")[1:], "value"), "no number 'value'"),
        (lambda r: rows.mean(r.of("b"), "controls.no-image"), "no number 'controls.no-image'"),
        (lambda r: rows.difference(r.of("alone"), r.of("alone")), "one seed has no spread"),
        (lambda r: rows.difference(r.of("a"), r.of("alone")), "other seeds than one another"),
        (lambda r: rows.fit([1, 1], [1, 2]), "a line needs two points"),
        (lambda r: rows.rises([1]), "a trend needs two points"),
    ],
)
def test_what_is_missing_is_said(ask, words):
    with pytest.raises(Missing) as error:
        ask(Rows(ROWS))
    assert words in str(error.value)


def test_rows_of_several_tasks_have_no_mean():
    with pytest.raises(ValueError, match=r"rows of several tasks \(t, u\): add task="):
        Rows(ROWS).of("two")
