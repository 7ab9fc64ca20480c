"""All cells of the matrix, each measured once; the table of an interrupted matrix goes on where it stopped.

OUT/cells/NAME.json    a finished cell, until the matrix is whole
OUT/results.json       all rows with their verdicts, and how they were made
OUT/table.md           the same for people
"""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import ranks
from benchmarks.cells import BITSANDBYTES, OURS, PEFT, Cell, Plan, urgent_first
from benchmarks.judge import faults, judged
from benchmarks.table import table
from mitrain.core import parsing, provenance
from mitrain.core.errors import ConfigError, MissingExtraError, UserError
from mitrain.core.files import write_atomic, write_json
from mitrain.core.provenance import commit, versions
from mitrain.training import schema
from mitrain.training.build import resolve_data, resolve_model
from mitrain.training.engine.zero import deepspeed

Row = dict[str, Any]
Measure = Callable[[Cell, Plan, float], Row]
Say = Callable[[str], object]
PACKAGES = ("torch", "transformers", "deepspeed", "bitsandbytes", "peft")


class ParityError(UserError):
    """Cells that are out of tolerance, hold too much or failed; everything has been written."""

    exit_code = 1


def parity(
    plan: Plan,
    cells: Sequence[Cell],
    out: Path,
    command: str,
    say: Say = print,
    limit_s: float = 3600,
    measure: Measure = ranks.measured,
) -> dict[str, Any]:
    """Measure ``cells``, write the results to ``out`` and return them; see `check` for their verdict."""
    rows: dict[Cell, Row] = {}
    for number, cell in enumerate(urgent_first(cells), 1):
        rows[cell] = row = cell_row(cell, plan, out, limit_s, measure)
        told = row.get("error") or f"loss {row['loss']:.6f}"
        say(f"[{number}/{len(cells)}] {cell.name}: {told} ({row['seconds']} s)")
    found = {"made": made_with(plan, command, rows.values()), "rows": judged([rows[cell] for cell in cells])}
    write_json(out / "results.json", found)
    write_atomic(out / "table.md", table(found["rows"], found["made"]))
    shutil.rmtree(out / "cells", ignore_errors=True)
    return found


def cell_row(cell: Cell, plan: Plan, out: Path, limit_s: float, measure: Measure) -> Row:
    """The cell as measured now, or by an interrupted run of the same plan; one that failed is tried again."""
    kept, identity = out / "cells" / f"{cell.name}.json", plan.identity(cell)
    found = read_kept(kept)
    if found.get("identity") == identity and "error" not in found:
        return found
    start = time.monotonic()
    row = asdict(cell) | measure(cell, plan, limit_s)
    row |= {"seconds": round(time.monotonic() - start), "commit": commit(), "identity": identity}
    write_json(kept, row)
    return row


def read_kept(path: Path) -> Row:
    """A kept row; nothing where there is none or the file is damaged."""
    try:
        found = parsing.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def prepare(plan: Plan) -> None:
    """What all cells need, brought here once: DeepSpeed, the models and the data. Errors are the user's, before a cell."""
    try:
        deepspeed()
    except ConfigError:
        raise MissingExtraError(
            "mitrain bench parity measures DeepSpeed's ZeRO, and deepspeed is not installed:"
            " install it with pip install 'mitrain[deepspeed]'"
        ) from None
    config = schema.load(plan.config, plan.overrides(Cell(OURS, "fp32", 0, 1)))
    if config.task.section_name != "answer":
        raise ConfigError(f"{plan.config} has task.name={config.task.section_name!r}: give a configuration of answer")
    resolve_data(config.data)
    for name in (config.model.llm, *(encoder.name for encoder in config.model.vision)):
        resolve_model(name)


def check(found: dict[str, Any]) -> None:
    """ParityError where a cell of ours is not ok."""
    out = faults(found["rows"])
    if out:
        raise ParityError(f"{len(out)} of {len(found['rows'])} cells are out: {'; '.join(out)}; see table.md")


def made_with(plan: Plan, command: str, rows: Iterable[Row]) -> dict[str, Any]:
    """Command, date, commits, versions and machine."""
    rows = list(rows)
    who = {row["who"] for row in rows}
    left_out = {"bitsandbytes": BITSANDBYTES, "peft": PEFT}
    names = [name for name in PACKAGES if left_out.get(name, OURS) in who]
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": ", ".join(sorted({row["commit"] for row in rows})),
        "versions": versions(names),
        "machine": machine(),
        **asdict(plan),
    }


def machine() -> str:
    """The machine, and what the ranks talk through."""
    return f"{provenance.machine()}, gloo, a thread per rank"
