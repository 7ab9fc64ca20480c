"""``mitrain compare``: methods beside one another, and the verdicts on claims."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mitrain.cli.shared import command, refused, say
from mitrain.errors import ConfigError


def add_compare(commands: Any) -> None:
    sub = command(
        commands, "compare", run_compare, "measure methods beside one another, or judge claims on what was measured"
    )
    sub.add_argument(
        "study", metavar="STUDY", help="a YAML file of a study or of the ledger, as those in configs/studies/"
    )
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="for the results (default: runs/compare/NAME), whose finished cells are kept; of a ledger for ledger.json, .md",
    )
    sub.add_argument("--seeds", metavar="N,N,…", help="measure these seeds in place of the study's; measured rows stay")
    sub.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="tasks, methods, axes or beginnings of cells' names"
    )
    sub.add_argument("--limit", type=float, metavar="S", help="seconds that a cell may take (default: the study's)")
    sub.add_argument("--list", action="store_true", help="show the cells with the time each takes, and stop")
    sub.add_argument(
        "--results", metavar="DIR", help="of a ledger: where its studies' results lie, in place of its own"
    )
    sub.add_argument("--measure", action="store_true", help="of a ledger: first measure the cells that its claims lack")


def run_compare(arguments: argparse.Namespace) -> Any:
    from mitrain.compare import study

    found = study.read(arguments.study)
    if arguments.limit is not None and not arguments.limit > 0:
        raise ConfigError(f"--limit {arguments.limit} leaves no time: give seconds above 0")
    if isinstance(found, study.Ledger):
        return run_ledger(arguments)
    if arguments.results or arguments.measure:
        raise ConfigError(f"{arguments.study} is a study: --results and --measure are for a ledger, leave them out")
    if not found.tasks:
        raise ConfigError(f"{arguments.study} has no cells of its own: measure {', '.join(found.uses)}")
    return run_study(arguments, found, Path(arguments.out or Path("runs/compare") / found.name))


def run_study(arguments: argparse.Namespace, study: Any, out: Path) -> Any:
    from mitrain.compare import compare

    job, seeds = compare.Job(study, Path(arguments.study), out), seeds_of(arguments.seeds)
    if arguments.list:
        cells = compare.listed(job, seeds, arguments.only, arguments.limit)
        say(arguments, list_text(cells))
        return {"study": study.name, "cells": cells}
    result = compare.compare(
        job,
        shown(arguments),
        seeds=seeds,
        only=arguments.only,
        limit_s=arguments.limit,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    say(arguments, (out / "table.md").read_text(encoding="utf-8"))
    return refused(compare.check, result)


def run_ledger(arguments: argparse.Namespace) -> Any:
    from mitrain.compare import ledger
    from mitrain.files import write_atomic, write_json

    if arguments.seeds or arguments.only or arguments.list or arguments.limit:
        raise ConfigError(f"{arguments.study} is a ledger: --seeds, --only, --list and --limit are for a study")
    if arguments.measure:
        measure_all(arguments)
    found = ledger.ledger(arguments.study, arguments.results)
    text = ledger.markdown(found)
    if arguments.out:
        write_json(Path(arguments.out) / "ledger.json", found)
        write_atomic(Path(arguments.out) / "ledger.md", text)
    say(arguments, text)
    return found


def measure_all(arguments: argparse.Namespace) -> None:
    """The cells of all studies that the claims read, into the ledger's results."""
    from mitrain.compare import compare, ledger

    for job in ledger.studies(arguments.study, arguments.results):
        found = compare.compare(job, ledger.measuring(job), say=lambda text: print(text, file=sys.stderr, flush=True))
        failed = [row for row in found["rows"] if row["status"] == compare.FAILED]
        if failed:
            print(f"mitrain: {len(failed)} cells of {job.path} failed", file=sys.stderr)


def seeds_of(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(not 0 <= seed < 2**31 for seed in found):
        raise ConfigError(f"--seeds {text} are no seeds: give whole numbers from 0, as --seeds 3,4")
    return list(dict.fromkeys(found))


def list_text(cells: list[dict[str, Any]]) -> str:
    from mitrain.telemetry import duration

    def time(cell: dict[str, Any]) -> str:
        return ("took " if cell["done"] else "at most " if cell["at_most"] else "about ") + duration(cell["seconds"])

    width = max((len(cell["cell"]) for cell in cells), default=0)
    lines = [f"{cell['cell']:<{width}}  {time(cell)}" for cell in cells]
    left = sum(cell["seconds"] for cell in cells if not cell["done"])
    done = sum(cell["done"] for cell in cells)
    return "\n".join(
        [*lines, f"{len(cells)} cells, {done} finished; the others take at most or about {duration(left)}"]
    )


def shown(arguments: argparse.Namespace) -> str:
    """The command that makes these results again; further seeds are named by the rows themselves."""
    words = ["mitrain compare", arguments.study]
    words += ["--out", arguments.out] if arguments.out else []
    words += ["--limit", f"{arguments.limit:g}"] if arguments.limit else []
    return " ".join(words)
