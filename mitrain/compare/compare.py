"""All cells of a study, each measured once; an interrupted comparison goes on where it stopped.

OUT/cells/NAME/        a cell's process while it is measured; stays behind where it failed or took too long
OUT/results.json       all rows and how they were made, written after every cell
OUT/table.md, *.svg    made from them alone
OUT/predictions/TASK-METHOD.png   what a method says of some samples, the same for all
"""

import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mitrain.compare import processes
from mitrain.compare.cells import MATTERS, Cell, CellId, cell_ids, chosen, resolve
from mitrain.compare.plots import plots
from mitrain.compare.search import Job, Row, searched, trial_count
from mitrain.compare.table import table
from mitrain.core import parsing
from mitrain.core.errors import PREEMPTED, ConfigError, MissingExtraError, UserError
from mitrain.core.files import file_lock, write_atomic, write_json
from mitrain.core.provenance import made_with

Measure = Callable[[Cell, Path, float], Row]
Say = Callable[[str], object]
OK, FAILED, TOO_LONG = "ok", "failed", "too long"
NEEDED = {"status": str, "reason": str | None, "identity": str, "digest": str, "metric": str | None,
          "value": int | float | None, "controls": dict, "seconds": int | float, "limit_s": int | float}  # fmt: skip
MADE = ("date", "commit", "machine", "versions")


class CompareError(UserError):
    """Cells failed; everything has been written."""

    exit_code = 1


def read_rows(out: Path) -> list[Row]:
    """The rows of results.json; none where there is no file or it is damaged."""
    rows = parsing.object_in(out / "results.json").get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    for row in rows:
        if isinstance(row.get("controls"), dict) and "no-image" in row["controls"]:  # the name before other inputs
            row["controls"] = {"other-inputs": row["controls"].pop("no-image"), **row["controls"]}
    return rows


def is_complete(row: Row) -> bool:
    """Whether a kept row has what is taken for granted here: files are edited and merged by hand."""
    fields = all(name in row and isinstance(row[name], kind) for name, kind in NEEDED.items())
    return fields and isinstance(row.get("made"), dict) and all(name in row["made"] for name in MADE)


def put_aside(out: Path, say: Say) -> None:
    """Rename a results.json that cannot be read: the next write would take its place."""
    path = out / "results.json"
    if path.exists() and not isinstance(parsing.object_in(path).get("rows"), list):
        path.replace(path.with_name("results.json.damaged"))
        say(f"{path} is damaged: kept as {path.name}.damaged, its cells are measured again")


def compare(
    job: Job,
    command: str,
    *,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    limit_s: float | None = None,
    say: Say = print,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Measure what is not measured yet of the chosen cells, write everything to ``job.out`` and return it.

    ``seeds``: others than the study's; rows of seeds that were measured before stay. See `check` for failed cells.
    """
    limit_s = job.study.limit_s if limit_s is None else limit_s
    named = {(cell_id.task, cell_id.method) for cell_id in chosen(job.study, only, seeds)}

    def tried(trials: Job) -> Sequence[Row]:
        if (*trials.study.tasks, *trials.study.methods) not in named:
            return kept_rows(trials)
        return compare(trials, command, limit_s=limit_s, say=say, measure=measure)["rows"]

    job = searched(job, tried)
    wanted = [resolve(job.study, job.path, cell_id) for cell_id in left(job, only, seeds)]
    with file_lock(job.out / ".held"):
        put_aside(job.out, say)
        rows = still_true(job, say)
        result = write(job, rows, command)
        for number, cell in enumerate(wanted, 1):
            key = cell.id.key()
            if finished(rows.get(key), cell, limit_s):
                continue
            taken = twin([*rows.values(), *beside(job.out)], cell)
            row = taken or cell_row(cell, job, limit_s, measure or in_process)
            rows[key] = row
            result = write(job, rows, command)
            outcome = f"{row['metric']} {row['value']:.4f}" if row.get("value") is not None else row["reason"] or OK
            time_taken = "measured already, for the same settings" if taken else f"{row['seconds']} s"
            say(f"[{number}/{len(wanted)}] {cell.id.name}: {outcome} ({time_taken})")
        draw(job, result, say)
    failed = sorted(" ".join(pair) for pair in job.undecided & named)
    return {**result, "no_trial": failed} if failed else result


def left(job: Job, only: Sequence[str], seeds: Sequence[int] | None) -> list[CellId]:
    """The cells that the words name, but for those whose settings no search has chosen."""
    return [c for c in chosen(job.study, only, seeds) if (c.task, c.method) not in job.undecided]


def still_true(job: Job, say: Say) -> dict[str, Row]:
    """Kept rows by cell, but those that the study has no longer or that were measured for other settings."""
    kept: dict[str, Row] = {}
    for row in read_rows(job.out):
        try:
            cell_id = CellId.of(row)
            there = is_complete(row) and cell_id in cell_ids(job.study, [cell_id.seed])
            cell = resolve(job.study, job.path, cell_id) if there else None
            if cell and cell.digest == row["digest"]:
                kept[cell_id.key()] = {**row, "reduced": cell.reduced}
                continue
            sheet_of(job.out, cell_id).unlink(missing_ok=True)
        except (ConfigError, KeyError, TypeError):
            pass
        say(f"damaged, no longer in the study, or measured for other settings: {row.get('task')} {row.get('method')}")
    return kept


def kept_rows(job: Job) -> list[Row]:
    return [*still_true(job, lambda _: None).values()]


def finished(row: Row | None, cell: Cell, limit_s: float) -> bool:
    if row is None or row["identity"] != cell.identity:
        return False
    return row["status"] == OK or (row["status"] == TOO_LONG and row["limit_s"] >= limit_s)


def twin(rows: Iterable[Row], cell: Cell) -> Row | None:
    """The row of another cell with the very same settings, as a method's own value on an axis or another study's cell."""
    for row in rows:
        if row.get("identity") == cell.identity and row.get("status") == OK:
            return {**row, **asdict(cell.id), "reduced": cell.reduced}
    return None


def beside(out: Path) -> list[Row]:
    """The rows of the studies whose results lie beside ``out``."""
    tables = [read_rows(path.parent) for path in sorted(out.parent.glob("*/results.json")) if path.parent != out]
    return [row for rows in tables for row in rows if is_complete(row)]


def cell_row(cell: Cell, job: Job, limit_s: float, measure: Measure) -> Row:
    """The cell as measured now; what it left is removed unless a later call can go on with it."""
    folder = job.out / "cells" / cell.id.name
    if parsing.object_in(folder / "cell.json").get("identity") != cell.identity:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cell.json", cell.to_dict())
    measured = measure(cell, folder, limit_s)
    if measured["status"] == OK:
        keep_predictions(job, cell.id, folder / "predictions.png")
        shutil.rmtree(folder, ignore_errors=True)
    elif measured["status"] == FAILED:
        shutil.rmtree(folder / "run", ignore_errors=True)
    base = {"metric": cell.part.metric, "value": None, "controls": {}, "reason": None, "reduced": cell.reduced}
    ids = {"digest": cell.digest, "identity": cell.identity, "limit_s": limit_s, "made": made_with(MATTERS)}
    return {**asdict(cell.id), **base, **measured, **ids}


def in_process(cell: Cell, folder: Path, limit_s: float) -> Row:
    """Measure a cell in a process of its own; KeyboardInterrupt where that was stopped from outside."""
    clock = processes.Clock(folder / "seconds")
    command = [sys.executable, "-m", "mitrain.compare.worker", str(folder), str(os.getpid())]
    try:
        code = processes.run(command, folder / "said.txt", max(0.0, limit_s - clock.before), beat=clock.keep)
    finally:
        clock.keep()
    seconds = round(clock.seconds)
    if code is None:
        return {"status": TOO_LONG, "reason": f"not finished after {limit_s:g} s", "seconds": seconds}
    if code == PREEMPTED:
        raise KeyboardInterrupt
    row = parsing.object_in(folder / "row.json")
    if code or row.get("identity") != cell.identity:
        said = processes.last_line(folder / "said.txt").removeprefix("mitrain: ")
        how = "" if code > 0 else f"killed by signal {-code}: " if code else "ended without its row: "
        return {"status": FAILED, "reason": how + said, "seconds": seconds}
    return {"status": OK, "seconds": seconds, **row}


def sheet_of(out: Path, cell_id: CellId) -> Path:
    return out / "predictions" / f"{CellId(cell_id.task, cell_id.method).name}.png"


def keep_predictions(job: Job, cell_id: CellId, sheet: Path) -> None:
    """A method's sheet of its first seed, or of another where there is none: results travel without them."""
    kept = sheet_of(job.out, cell_id)
    if sheet.exists() and (cell_id.seed == job.study.seeds[0] or not kept.exists()):
        kept.parent.mkdir(exist_ok=True)
        sheet.replace(kept)


def write(job: Job, rows: dict[str, Row], command: str) -> dict[str, Any]:
    """results.json: the rows in the study's order, how they were made, and which of its lines have none."""
    seeds = sorted({row["seed"] for row in rows.values() if row["seed"] is not None} | set(job.study.seeds))
    ordered = [rows[cell_id.key()] for cell_id in cell_ids(job.study, seeds) if cell_id.key() in rows]
    result = {
        "study": job.study.name,
        "title": job.study.title,
        "kind": job.study.kind,
        **({"against": job.study.against} if job.study.against else {}),
        **({"search": list(job.chosen)} if job.chosen else {}),
        "made": joined(ordered, command),
        "rows": ordered,
        "missing": [name for name in lines(cell_ids(job.study)) if name not in lines(map(CellId.of, ordered))],
    }
    write_json(job.out / "results.json", result)
    return result


def lines(cells: Iterable[CellId]) -> list[str]:
    """The cells' names without their seeds, each once: what is a line of the table."""
    return list(dict.fromkeys(replace(cell_id, seed=None).name for cell_id in cells))


def joined(rows: Sequence[Row], command: str) -> dict[str, Any]:
    """Everything that the rows were made with, several values joined."""
    used = {f"{name} {version}" for row in rows for name, version in row["made"]["versions"].items()}
    shared = {key: ", ".join(sorted({row["made"][key] for row in rows})) for key in ("date", "commit", "machine")}
    return {"command": command, **shared, "versions": ", ".join(sorted(used))}


def draw(job: Job, result: dict[str, Any], say: Say) -> None:
    """The table and the figures, from the rows."""
    write_atomic(job.out / "table.md", table(result))
    try:
        figures = plots(result)
    except MissingExtraError as error:
        say(f"there are no figures: {error}")
        return
    for name, svg in figures.items():
        write_atomic(job.out / f"{name}.svg", svg)


def check(result: dict[str, Any]) -> None:
    """CompareError where cells failed, or all trials of a search."""
    if searches := result.get("no_trial"):
        raise CompareError(
            f"no trial of a round went through, so that no settings were chosen for {', '.join(searches)}: see the reasons"
            " in search/*/table.md beside the table"
        )
    failed = [row for row in result["rows"] if row["status"] == FAILED]
    if failed:
        shown = "; ".join(f"{CellId.of(row).name}: {row['reason']}" for row in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise CompareError(f"{len(failed)} of {len(result['rows'])} cells failed: {shown}{more}; see table.md")


def listed(job: Job, seeds: Sequence[int] | None, only: Sequence[str], limit_s: float | None = None) -> list[dict[str, Any]]:
    """The chosen cells: whether each is finished, and about how many seconds it takes or took.

    An estimate is the median of measured cells of the same task and method, else of the task; else the limit.
    """
    limit_s = job.study.limit_s if limit_s is None else limit_s
    job = searched(job, kept_rows)
    kept = {CellId.of(row).key(): row for row in read_rows(job.out)}
    entries, trials_s = [], limit_s * trial_count(job.study.search) if job.undecided else 0
    for task, method in sorted(job.undecided):  # searches that are not finished: their cells are known after them
        if (cell_id := CellId(task, method)).named_by(only):
            name = f"{task}-{method}, search on val"
            entries.append({"cell": name, "done": False, "seconds": trials_s, "at_most": True} | asdict(cell_id))
    for cell_id in left(job, only, seeds):
        cell = resolve(job.study, job.path, cell_id)
        row = kept.get(cell_id.key())
        done = finished(row, cell, limit_s)
        known = row["seconds"] if done and row else estimate(kept.values(), cell_id)
        bound = known is None
        entries.append(
            {"cell": cell_id.name, "done": done, "seconds": limit_s if bound else known, "at_most": bound} | asdict(cell_id)
        )
    return entries


def estimate(rows: Any, cell_id: CellId) -> float | None:
    rows = list(rows)
    for keys in (("task", "method"), ("task",)):
        near = [row["seconds"] for row in rows if all(row[key] == getattr(cell_id, key) for key in keys)]
        if near:
            return round(statistics.median(near))
    return None
