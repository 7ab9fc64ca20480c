"""The ledger: for each claim what was measured, and the verdict that its rule gives on the result rows."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mitrain.compare import rules
from mitrain.compare.cells import Place, places, resolve
from mitrain.compare.compare import Job
from mitrain.compare.rules import Missing, Rows
from mitrain.compare.study import Claim, Ledger, Study, read
from mitrain.compare.table import text
from mitrain.core.errors import ConfigError

Row = dict[str, Any]
CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "open"


def ledger(path: str | Path, results: str | Path | None = None) -> dict[str, Any]:
    """One row per claim of the ledger's file, with its verdict; ``results``: a folder in place of the ledger's own."""
    book = read(path)
    if not isinstance(book, Ledger):
        raise ConfigError(f"{path} is a study and no ledger: a ledger has the keys ledger, claims and results")
    folder = Path(path).parent
    kept = Path(results) if results else folder / book.results
    rows = [entry(claim_job(folder / name, kept), kept) for name in book.claims]
    twice = {row["claim"] for row in rows if [r["claim"] for r in rows].count(row["claim"]) > 1}
    if twice:
        raise ConfigError(f"{path}: the claim {min(twice)} stands twice: give each its own id")
    return {"ledger": book.ledger, "rows": rows}


def studies(path: str | Path, results: str | Path | None = None) -> list[Job]:
    """The studies with cells that the ledger's claims read, each once."""
    book = read(path)
    if not isinstance(book, Ledger):
        raise ConfigError(f"{path} is a study and no ledger: a ledger has the keys ledger, claims and results")
    folder = Path(path).parent
    kept = Path(results) if results else folder / book.results
    jobs = [source for name in book.claims for source in sources(claim_job(folder / name, kept), kept)]
    return list({job.path.resolve(): job for job in jobs}.values())


def claim_job(path: Path, results: Path) -> Job:
    study = read(path)
    if isinstance(study, Ledger) or study.claim is None:
        raise ConfigError(f"{path} has no claim: a ledger lists studies that have one")
    return Job(study, path, results / study.name)


def entry(job: Job, results: Path) -> Row:
    """A claim's row."""
    claim = job.study.claim
    assert claim is not None
    jobs = sources(job, results)
    rows = Rows(row for source in jobs for row in expected(source))
    try:
        found, reason, measured = verdict(claim, rows)
    except ConfigError as error:
        raise ConfigError(f"{job.path}: {error}") from None
    files = [source.out / "results.json" for source in jobs]
    return {
        "claim": claim.id,
        "text": claim.text,
        "expected": claim.expected,
        "measured": {name: measured[name] for name in claim.measured or claim.quantities if name in measured},
        "rule": rule_of(claim),
        "verdict": found,
        "reason": reason,
        "note": claim.note,
        "data": claim.data,
        "cells": [Place.of(row).name for row in rows.read],
        "reduced": sorted({row["reduced"] for row in rows.read if row.get("reduced")}),
        "result_file": ", ".join(shown(file) for file in files),
        "command": " && ".join(measuring(source) for source in jobs),
    }


def sources(job: Job, results: Path) -> list[Job]:
    """The studies whose rows a claim's rule reads: its own where it has cells, and those that it uses."""
    own = [job] if job.study.tasks else []
    for name in job.study.uses:
        path = job.path.parent / name
        study = read(path)
        if isinstance(study, Ledger):
            raise ConfigError(f"{job.path}: uses {name}, which is a ledger: name a study")
        own.append(Job(study, path, results / study.name))
    return own


def expected(job: Job) -> list[Row]:
    """A row for every cell of a study, and for every further seed that was measured; unmeasured ones say so."""
    kept: dict[str, Row] = {}
    for row in job.kept:
        try:
            kept[Place.of(row).key()] = row
        except KeyError:
            continue
    seeds = {row["seed"] for row in kept.values() if isinstance(row["seed"], int)} | set(job.study.seeds)
    there = places(job.study, sorted(seeds))
    return [seen(job, place, kept.get(place.key())) for place in there if due(job.study, place, kept)]


def due(study: Study, place: Place, kept: Mapping[str, Row]) -> bool:
    return place.seed is None or place.seed in study.seeds or place.key() in kept


def seen(job: Job, place: Place, row: Row | None) -> Row:
    """A place's row, or what stands in for it: rows of other settings than the study's do not count."""
    blank = {"task": place.task, "method": place.method, "axis": place.axis, "at": place.at, "seed": place.seed}
    if row is None:
        return {**blank, "status": "not measured", "reason": None}
    try:
        same = resolve(job.study, job.path, place).digest == row.get("digest")
    except ConfigError as error:
        return {**blank, "status": "not known here", "reason": str(error)}
    return row if same else {**blank, "status": "measured for other settings", "reason": None}


def verdict(claim: Claim, rows: Sequence[Row]) -> tuple[str, str, dict[str, Any]]:
    """What the rule says, why it is open, and the quantities that could be computed.

    A condition is decided where the rows that it needs are there, whatever else is missing. Open where neither holds;
    ConfigError where both do.
    """
    known: dict[str, Any] = {}
    held: list[bool] = []
    missing = ""
    for name, expression in claim.quantities.items():
        try:
            known[name] = rules.value_of(expression, rows, known)
        except Missing as error:
            known[name] = error
    for rule in (claim.confirmed, claim.refuted):
        try:
            held.append(bool(rules.value_of(rule, rows, known)))
        except Missing as error:
            held.append(False)
            missing = missing or str(error)
    if all(held):
        raise ConfigError(f"the claim {claim.id} is confirmed and refuted by the same rows: correct its rule")
    found = CONFIRMED if held[0] else REFUTED if held[1] else OPEN
    reason = "" if any(held) else missing or "neither condition holds"
    return found, reason, {name: value for name, value in known.items() if not isinstance(value, Missing)}


def rule_of(claim: Claim) -> str:
    quantities = [f"{name} = {' '.join(expression.split())}" for name, expression in claim.quantities.items()]
    return "; ".join([*quantities, f"confirmed if {claim.confirmed}", f"refuted if {claim.refuted}", "else open"])


def measuring(job: Job) -> str:
    """The command that measures a study's cells."""
    return shlex.join(["mitrain", "compare", shown(job.path), "--out", shown(job.out)])


def shown(path: Path) -> str:
    """A path as a user would type it: below the working folder where it lies there."""
    whole, here = Path(os.path.abspath(path)), Path.cwd()
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) else str(path)


def markdown(found: Mapping[str, Any]) -> str:
    """The ledger as a table."""
    head = ["claim", "says", "expected", "measured", "verdict", "on", "by"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found["rows"]:
        beside = "; ".join(filter(None, [row["reason"], row["note"], *row["reduced"]]))
        verdict_cell = f"**{row['verdict']}**" + (f": {text(beside)}" if beside else "")
        cells = [row["claim"], *map(text, (row["text"], row["expected"], numbers(row["measured"])))]
        commands = "<br>".join(f"`{command}`" for command in row["command"].split(" && "))
        lines.append("| " + " | ".join([*cells, verdict_cell, text(row["data"]), commands]) + " |")
    return "\n".join([*lines, ""])


def numbers(measured: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {plain(value)}" for name, value in measured.items()) or "–"


def plain(value: Any) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(map(plain, value)) + ")"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
