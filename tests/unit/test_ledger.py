"""The ledger: verdicts follow from rows, whatever is missing is said, and a changed number flips them."""

import json

import pytest
import yaml
from source_tree import ROOT
from test_compare_run import NUMBERS
from test_compare_study import BASE, STUDY

from mitrain.cli import main
from mitrain.compare import cells, ledger, study
from mitrain.compare.compare import Job
from mitrain.core.errors import ConfigError

STUDIES = ROOT / "configs" / "studies"
CLAIM = {
    "id": "X1",
    "text": "MiT | sees",
    "expected": "more than nothing",
    "quantities": {
        "gain": 'mean("value", method="mit", task="label") - mean("value", method="none", task="label")',
        "error": 'noise("value", "mit", "none", task="label")',
    },
    "measured": ["gain"],
    "confirmed": "gain > error",
    "refuted": "gain < -error",
}
METHODS = {"mit": {}, "none": {"adapter": {"name": "none"}}}


@pytest.fixture
def book(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "x1.yaml").write_text(yaml.safe_dump({**STUDY, "name": "x1", "methods": METHODS, "claim": CLAIM}))
    path = tmp_path / "ledger.yaml"
    path.write_text(yaml.safe_dump({"ledger": "claims", "claims": ["x1.yaml"], "results": "results"}))
    return path


def results(book, values, name="x1", **changes):
    """Result rows of a study as a measurement leaves them; ``values``: {(method, seed): value}."""
    found = study.read(book.parent / f"{name}.yaml")
    rows = []
    for place in cells.places(found, sorted({seed for _, seed in values})):
        if (place.method, place.seed) in values:
            cell = cells.resolve(found, book.parent / f"{name}.yaml", place)
            row = {"task": place.task, "method": place.method, "axis": None, "at": None, "seed": place.seed, **NUMBERS}
            row |= {"status": "ok", "reason": None, "reduced": None, "digest": cell.digest}
            rows.append({**row, "value": values[place.method, place.seed], **changes})
    out = book.parent / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({"rows": rows}))
    return out / "results.json"


GOOD = {("mit", 0): 0.8, ("mit", 1): 0.9, ("none", 0): 0.5, ("none", 1): 0.4}


def verdict(book):
    (row,) = ledger.ledger(book)["rows"]
    return row["verdict"], row["reason"]


def test_a_changed_result_flips_the_verdict(book):
    path = results(book, GOOD)
    assert verdict(book) == ("confirmed", "")
    document = json.loads(path.read_text())
    for row in document["rows"]:
        if row["method"] == "none":
            row["value"] = 0.99
    path.write_text(json.dumps(document))
    assert verdict(book) == ("refuted", "")
    document["rows"][0]["value"] = 1.1
    path.write_text(json.dumps(document))
    assert verdict(book) == ("open", "neither condition holds")


def test_the_rows_fields(book):
    results(book, GOOD)
    (row,) = ledger.ledger(book)["rows"]
    assert row["measured"] == {"gain": pytest.approx(0.4)}
    assert row["cells"] == ["label-mit-seed0", "label-mit-seed1", "label-none-seed0", "label-none-seed1"]
    assert row["rule"].endswith("confirmed if gain > error; refuted if gain < -error; else open")
    assert row["result_file"].endswith("results/x1/results.json")
    assert row["command"].startswith("mitrain compare ") and row["command"].endswith("results/x1")
    assert (row["claim"], row["expected"]) == ("X1", "more than nothing")


def test_what_is_missing_leaves_the_claim_open_and_is_said(book):
    assert verdict(book) == ("open", "label mit seed 0: not measured")
    results(book, {key: value for key, value in GOOD.items() if key != ("none", 1)})
    assert verdict(book) == ("open", "label none seed 1: not measured")
    results(book, GOOD, status="too long", reason="not finished after 240 s")
    assert verdict(book) == ("open", "label mit seed 0: too long (not finished after 240 s)")
    results(book, GOOD, value=None)
    assert verdict(book)[1] == "label mit seed 0: no number 'value'"


def test_what_cannot_change_the_verdict_may_be_missing(book):
    """A claim on two comparisons fails with one of them, and is confirmed by both alone."""
    other = 'mean("value", method="adapter of another project", task="label")'
    claim = CLAIM | {
        "quantities": CLAIM["quantities"] | {"above": f'mean("value", method="mit", task="label") - {other}'},
        "confirmed": "gain > error and above > 0",
        "refuted": "gain < -error or above < 0",
    }
    (book.parent / "x1.yaml").write_text(yaml.safe_dump({**STUDY, "name": "x1", "methods": METHODS, "claim": claim}))
    results(book, GOOD)
    assert verdict(book)[0] == "open" and "no row with method=adapter of another project" in verdict(book)[1]
    results(book, {(method, seed): 1 - value for (method, seed), value in GOOD.items()})
    assert verdict(book) == ("refuted", "")


def test_rows_of_other_settings_do_not_count(book):
    results(book, GOOD, digest="0" * 12)
    assert verdict(book) == ("open", "label mit seed 0: measured for other settings")


def test_a_further_seed_counts_where_it_was_measured(book):
    results(book, GOOD | {("mit", 3): 0.7, ("none", 3): 0.6})
    (row,) = ledger.ledger(book)["rows"]
    assert row["measured"]["gain"] == pytest.approx(0.3) and "label-mit-seed3" in row["cells"]
    results(book, GOOD | {("mit", 3): 0.7})
    (row,) = ledger.ledger(book)["rows"]
    assert row["verdict"] == "open" and "other seeds" in row["reason"]


def test_a_method_that_is_not_known_here_leaves_its_claim_open(book):
    methods = {**METHODS, "mit": {"adapter": {"name": "later"}}}
    (book.parent / "x1.yaml").write_text(yaml.safe_dump({**STUDY, "name": "x1", "methods": methods, "claim": CLAIM}))
    out = book.parent / "results/x1"
    out.mkdir(parents=True)
    row = {
        "task": "label",
        "method": "mit",
        "axis": None,
        "at": None,
        "seed": 0,
        **NUMBERS,
        "status": "ok",
        "digest": "x",
    }
    (out / "results.json").write_text(json.dumps({"rows": [row]}))
    assert "not known here" in verdict(book)[1] and "'later' is not known" in verdict(book)[1]


def test_a_claim_reads_the_rows_of_other_studies(book):
    shared = {**STUDY, "name": "shared", "methods": METHODS}
    (book.parent / "shared.yaml").write_text(yaml.safe_dump(shared))
    (book.parent / "x1.yaml").write_text(yaml.safe_dump({"name": "x1", "uses": ["shared.yaml"], "claim": CLAIM}))
    results(book, GOOD, "shared")
    (row,) = ledger.ledger(book)["rows"]
    assert row["verdict"] == "confirmed" and row["result_file"].endswith("results/shared/results.json")


def test_a_rule_that_says_both_is_the_users_to_mend(book):
    claim = {**CLAIM, "refuted": "gain > 0"}
    (book.parent / "x1.yaml").write_text(yaml.safe_dump({**STUDY, "name": "x1", "methods": METHODS, "claim": claim}))
    results(book, GOOD)
    with pytest.raises(ConfigError, match="X1 is confirmed and refuted"):
        ledger.ledger(book)


def test_a_rule_that_cannot_be_computed_names_its_file(book):
    results(book, GOOD)
    values = yaml.safe_load((book.parent / "x1.yaml").read_text())
    values["claim"]["quantities"]["error"] = 'mean("value", methd="mit")'
    (book.parent / "x1.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"x1\.yaml: the rule .*'methd' is no axis of the study"):
        ledger.ledger(book)


def test_the_table_is_markdown(book):
    results(book, GOOD, reduced="60 steps")
    text = ledger.markdown(ledger.ledger(book))
    (line,) = [line for line in text.splitlines() if line.startswith("| X1 ")]
    assert "| MiT / sees | more than nothing | gain 0.4 | **confirmed**: 60 steps |" in line
    assert line.count("|") == 8


def test_the_command(book, capsys):
    results(book, GOOD)
    assert main(["compare", str(book), "--json", "--out", str(book.parent / "shown")]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    names = ("claim", "measured", "expected", "rule", "verdict", "cells", "result_file", "command")
    assert all(name in row for name in names)
    assert "**confirmed**" in (book.parent / "shown/ledger.md").read_text()
    assert main(["compare", str(book), "--seeds", "3"]) == 2
    assert "are for a study" in capsys.readouterr().err
    assert main(["compare", str(book), "--results", str(book.parent / "elsewhere"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["verdict"] == "open"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"claims": ["base.yaml"]}, "base.yaml: unknown key 'adapter'"),
        ({"claims": ["none.yaml"]}, "no configuration file"),
        ({"claims": ["plain.yaml"]}, "plain.yaml has no claim"),
        ({"claims": ["x1.yaml", "x1.yaml"]}, "the claim X1 stands twice"),
        ({"claims": []}, "claims="),
    ],
)
def test_bad_ledgers_are_one_line(book, values, words):
    (book.parent / "plain.yaml").write_text(yaml.safe_dump(STUDY))
    book.write_text(yaml.safe_dump({"ledger": "claims", "claims": ["x1.yaml"], "results": "results", **values}))
    with pytest.raises(ConfigError, match=words) as error:
        ledger.ledger(book)
    assert "\n" not in str(error.value)


SHIPPED = sorted(STUDIES.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_study_is_read_and_its_cells_have_configurations(path):
    found = study.read(path)
    if isinstance(found, study.Ledger):
        assert {STUDIES / name for name in found.claims} <= set(SHIPPED)
        return
    assert found.name == path.stem
    firsts = {(place.task, place.method, place.axis, repr(place.at)): place for place in reversed(cells.places(found))}
    for place in firsts.values():
        cells.resolve(found, path, place)
    for name in found.uses:
        assert isinstance(study.read(path.parent / name), study.Study)


def test_the_committed_verdicts_are_those_of_the_committed_rows():
    """Nobody typed them, and nobody forgot to judge again."""
    committed = json.loads((ROOT / "docs" / "results" / "ledger" / "ledger.json").read_text())["rows"]
    keys = ("claim", "text", "expected", "rule", "verdict", "reason", "cells", "measured")
    judged = ledger.ledger(STUDIES / "ledger.yaml")["rows"]
    assert [[row[key] for key in keys] for row in committed] == [[row[key] for key in keys] for row in judged]


def test_the_shipped_rules_find_their_rows():
    """With a row for every cell no claim is open for a row that cannot be there: rules name the studies' own cells."""
    book = study.read(STUDIES / "ledger.yaml")
    for name in book.claims:
        job = ledger.claim_job(STUDIES / name, STUDIES)
        rows = [
            full(row)
            for source in ledger.sources(job, STUDIES)
            for row in ledger.expected(Job(source.study, source.path, ROOT / "none"))
        ]
        _, reason, _ = ledger.verdict(job.study.claim, rows)
        assert "no row with" not in reason or "uniadapter" in reason, f"{name}: {reason}"


def full(row):
    """A row in which every number is there."""

    class Everything(dict):
        def get(self, key, default=None):
            return super().get(key, 1.5 + (row["seed"] or 0) / 10)

        def __missing__(self, key):
            return Everything()

    return Everything({**row, "status": "ok"})
