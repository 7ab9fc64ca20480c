"""All cells of the matrix, each measured once; the table of an interrupted matrix goes on where it stopped."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import ranks, results
from benchmarks.parity.cells import BITSANDBYTES, OURS, PEFT, Cell, Plan, urgent_first
from benchmarks.parity.judge import faults, judged
from benchmarks.parity.table import table
from mitrain.core.errors import ConfigError, UserError
from mitrain.core.provenance import made_with
from mitrain.training import schema
from mitrain.training.build import resolve_data, resolve_model

Row = dict[str, Any]
Measure = Callable[[Cell, Plan, float], Row]
Say = Callable[[str], object]
PACKAGES = ("torch", "transformers", "deepspeed", "bitsandbytes", "peft")


class ParityError(UserError):
    """Cells that are out of tolerance, hold too much or failed; everything has been written."""

    exit_code = 1


def measured(cell: Cell, plan: Plan, limit_s: float, work: Callable[[Cell, Plan, Path], None] | None = None) -> Row:
    """What the cell's ranks found, or ``{"error": …}``."""
    if work is None:
        from benchmarks.parity.worker import work
    try:
        return ranks.found(work, (cell, plan), cell.ranks, limit_s)
    except UserError as error:
        return {"error": str(error)}


def parity(
    plan: Plan,
    cells: Sequence[Cell],
    out: Path,
    command: str,
    say: Say = print,
    limit_s: float = 3600,
    measure: Measure = measured,
) -> dict[str, Any]:
    """Measure ``cells``, write the results to ``out`` and return them; see `check` for their verdict."""
    rows: dict[Cell, Row] = {}
    for number, cell in enumerate(urgent_first(cells), 1):
        rows[cell] = row = results.row(
            out, cell.name, plan.identity(cell), lambda cell=cell: asdict(cell) | measure(cell, plan, limit_s)
        )
        outcome = row.get("error") or f"loss {row['loss']:.6f}"
        say(f"[{number}/{len(cells)}] {cell.name}: {outcome} ({row['seconds']} s)")
    found = {"made": made(plan, command, rows.values()), "rows": judged([rows[cell] for cell in cells])}
    results.write(out, found, table(found["rows"], found["made"]))
    return found


def prepare(plan: Plan) -> None:
    """What all cells need, brought here once: DeepSpeed, the models and the data. Errors are the user's, before a cell."""
    ranks.need_deepspeed("parity")
    config = schema.load(plan.config, plan.overrides(Cell(OURS, "fp32", 0, 1)))
    if config.task.section_name != "answer":
        raise ConfigError(f"{plan.config} has task.name={config.task.section_name!r}: give a configuration of answer")
    resolve_data(config.data)
    for name in (config.model.llm, *(encoder.name for encoder in config.model.encoders.values())):
        resolve_model(name)


def check(found: dict[str, Any]) -> None:
    """ParityError where a cell of ours is not ok."""
    out = faults(found["rows"])
    if out:
        raise ParityError(f"{len(out)} of {len(found['rows'])} cells are out: {'; '.join(out)}; see table.md")


def made(plan: Plan, command: str, rows: Iterable[Row]) -> dict[str, Any]:
    """How the rows were made, of whatever commits they are."""
    rows = list(rows)
    who = {row["who"] for row in rows}
    left_out = {"bitsandbytes": BITSANDBYTES, "peft": PEFT}
    found = made_with(name for name in PACKAGES if left_out.get(name, OURS) in who)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return {**found, "command": command, "commit": commits, "machine": ranks.machine(), **asdict(plan)}
