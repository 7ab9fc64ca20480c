"""The ledger: for each claim what was measured, and the verdict that the result rows give it."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.claims import CLAIMS
from benchmarks.claims.claim import Claim
from benchmarks.claims.rows import Estimate, Missing, Rows
from mitrain.compare.cells import CellId, cell_ids, resolve
from mitrain.compare.compare import FAILED, compare, kept_rows, read_rows
from mitrain.compare.search import Job, searched
from mitrain.compare.study import Study, read
from mitrain.core import markdown
from mitrain.core.errors import ConfigError
from mitrain.core.markdown import plain

Row = dict[str, Any]
CONFIRMED, CONTRADICTED, NOT_SEEN, NOT_TESTED = "confirmed", "contradicted", "not seen at this scale", "not tested"
REPOSITORY = Path(__file__).parents[2]
STUDIES, RESULTS = REPOSITORY / "configs" / "studies", REPOSITORY / "docs" / "results" / "compare"


def ledger(claims: Sequence[Claim] = CLAIMS, results: Path = RESULTS, studies: Path = STUDIES) -> dict[str, Any]:
    """A row per claim with its verdict. ``studies``: a folder of NAME.yaml; ``results``: one of NAME/results.json."""
    return {"rows": [entry(claim, jobs([claim], results, studies)) for claim in claims]}


def jobs(claims: Sequence[Claim], results: Path, studies: Path) -> list[Job]:
    """The studies whose rows the claims read, each once."""
    names = dict.fromkeys(name for claim in claims for name in claim.studies)
    paths = {name: studies / f"{name}.yaml" for name in names}
    return [Job(read(path), path, results / name) for name, path in paths.items()]


def measure(found: Sequence[Job], say: Callable[[str], object]) -> None:
    """The cells that the studies lack, into their results; what failed is not tested."""
    for job in found:
        rows = compare(job, measuring(job), say=say)["rows"]
        failed = sum(row["status"] == FAILED for row in rows)
        if failed:
            say(f"mitrain: {failed} cells of {job.path} failed")


def entry(claim: Claim, found: Sequence[Job]) -> Row:
    """A claim's row."""
    rows = Rows([row for job in found for row in expected(job)])
    decided, reason, measured = verdict(claim, rows)
    estimates = {name: value for name, value in measured.items() if isinstance(value, Estimate)}
    return {
        "claim": claim.id,
        "text": claim.text,
        "expected": claim.expected,
        "measured": {name: value.value if isinstance(value, Estimate) else value for name, value in measured.items()},
        "interval": {name: [value.low, value.high] for name, value in estimates.items()} or None,
        "smallest_effect_seen": None if decided == NOT_SEEN and blind(estimates) else smallest(estimates),
        "rule": claim.rule,
        "verdict": decided,
        "reason": reason,
        "note": claim.note,
        "data": claim.data,
        "cells": [CellId.of(row).name for row in rows.read],
        "reduced": sorted({row["reduced"] for row in rows.read if row.get("reduced")}),
        "result_file": ", ".join(shown(job.out / "results.json") for job in found),
        "command": " && ".join(map(measuring, found)),
    }


def verdict(claim: Claim, rows: Rows) -> tuple[str, str, dict[str, Any]]:
    """What the rows say, why no more than that, and what was measured; ConfigError where they confirm and contradict.

    Runs that a study calls reduced were never meant as a test of the papers' size: they contradict nothing.
    """
    measured = SimpleNamespace()
    try:
        confirmed, contradicted = claim.decide(rows, measured)
    except (Missing, ZeroDivisionError) as error:
        return NOT_TESTED, str(error), vars(measured)
    if confirmed and contradicted:
        raise ConfigError(f"the claim {claim.id} is confirmed and contradicted by the same rows: correct its conditions")
    if confirmed:
        return CONFIRMED, "", vars(measured)
    if contradicted and not any(row.get("reduced") for row in rows.read):
        return CONTRADICTED, "", vars(measured)
    estimates = {name: value for name, value in vars(measured).items() if isinstance(value, Estimate)}
    least = smallest(estimates)
    seen = "" if least is None else f"an effect below {number(least)} could not have been seen"
    if same := blind(estimates):
        seen = f"of {' and '.join(same)} nothing can be said: both sides scored the same in every sample and seed"
    reason = "measured the other way round, by runs too small to contradict" if contradicted else "neither condition holds"
    return NOT_SEEN, "; ".join(filter(None, [reason, seen])), vars(measured)


def smallest(estimates: Mapping[str, Estimate]) -> float | None:
    """The smallest effect that all of them would have told from none."""
    return max((value.least for value in estimates.values()), default=None)


def blind(estimates: Mapping[str, Estimate]) -> list[str]:
    """Those without any spread: no sample came out otherwise, and how large an effect would have shown is not known."""
    return [name for name, value in estimates.items() if value.low == value.high]


def expected(job: Job) -> list[Row]:
    """A row for every cell of a study, and for every further seed that was measured; unmeasured ones say so."""
    job = searched(job, kept_rows)
    kept: dict[str, Row] = {}
    for row in read_rows(job.out):
        try:
            kept[CellId.of(row).key()] = row
        except KeyError:
            continue
    seeds = {row["seed"] for row in kept.values() if isinstance(row["seed"], int)} | set(job.study.seeds)
    there = cell_ids(job.study, sorted(seeds))
    return [seen(job, cell_id, kept.get(cell_id.key())) for cell_id in there if due(job.study, cell_id, kept)]


def due(study: Study, cell_id: CellId, kept: Mapping[str, Row]) -> bool:
    return cell_id.seed is None or cell_id.seed in study.seeds or cell_id.key() in kept


def seen(job: Job, cell_id: CellId, row: Row | None) -> Row:
    """A cell's row, or what stands in for it: rows of other settings than the study's do not count."""
    blank = {
        "task": cell_id.task,
        "method": cell_id.method,
        "axis": cell_id.axis,
        "at": cell_id.at,
        "seed": cell_id.seed,
    }
    if row is None:
        return {**blank, "status": "not measured", "reason": None}
    try:
        same = resolve(job.study, job.path, cell_id).digest == row.get("digest")
    except ConfigError as error:
        return {**blank, "status": "not known here", "reason": str(error)}
    return row if same else {**blank, "status": "measured for other settings", "reason": None}


def measuring(job: Job) -> str:
    """The command that measures a study's cells."""
    return shlex.join(["mitrain", "compare", shown(job.path), "--out", shown(job.out)])


def shown(path: Path) -> str:
    """A path as a user would type it: below the working folder where it lies there."""
    whole, here = Path(os.path.abspath(path)), Path.cwd()
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) else str(path)


def table(found: Mapping[str, Any]) -> str:
    """The ledger as Markdown."""
    head = ["claim", "says", "expected", "measured", "verdict", "on", "by"]
    return "\n".join([*markdown.table(head, [cells(row) for row in found["rows"]]), ""])


def cells(row: Row) -> list[str]:
    beside = "; ".join(filter(None, [row["reason"], row["note"], *row["reduced"]]))
    verdict_cell = f"**{row['verdict']}**" + (f": {plain(beside)}" if beside else "")
    intervals = row["interval"] or {}
    shown = [
        f"{name.replace('_', ' ')} {number(value)}" + (f" {spanned(intervals[name])}" if name in intervals else "")
        for name, value in row["measured"].items()
    ]
    measured = ", ".join(shown) or "–"
    said = map(plain, (row["text"], row["expected"], measured))
    commands = "<br>".join(f"`{command}`" for command in row["command"].split(" && "))
    return [row["claim"], *said, verdict_cell, plain(row["data"]), commands]


def spanned(interval: Sequence[float]) -> str:
    return f"({number(interval[0])} to {number(interval[1])})"


def number(value: float | list[float]) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(map(number, value)) + ")"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
