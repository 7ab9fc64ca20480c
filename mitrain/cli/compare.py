"""``mitrain compare``: methods beside one another."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mitrain.cli.shared import describe, refused, say
from mitrain.core.errors import ConfigError

EXAMPLES = """  mitrain compare configs/studies/fusion.yaml --list      the cells, and how long each takes
  mitrain compare configs/studies/fusion.yaml --only mit lora --seeds 0,1
"""


def add_compare(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_compare, EXAMPLES)
    sub.add_argument("study", metavar="STUDY", help="a YAML file as those in configs/studies/, or a shipped one's name")
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results (default: runs/compare/NAME); called again, finished cells are kept",
    )
    sub.add_argument("--seeds", metavar="N,N,…", help="these seeds in place of the study's; rows that were measured stay")
    sub.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only cells of these tasks, methods or axes, or whose names begin so",
    )
    sub.add_argument("--limit", type=float, metavar="S", help="seconds that a cell may take (default: the study's)")
    sub.add_argument("--list", action="store_true", help="show the cells with the time each takes, and stop")


def run_compare(arguments: argparse.Namespace) -> Any:
    from mitrain.core import config

    path = config.located(arguments.study)  # whose cells name configurations as seen from it
    config.read_file(path)  # before torch is imported, which takes seconds
    from mitrain.compare import compare, search, study

    asked = study.read(path)
    if arguments.limit is not None and not arguments.limit > 0:
        raise ConfigError(f"--limit {arguments.limit} leaves no time: give seconds above 0")
    out = Path(arguments.out or Path("runs/compare") / asked.name)
    job, seeds = search.Job(asked, path, out), seeds_of(arguments.seeds)
    if arguments.list:
        cells = compare.listed(job, seeds, arguments.only, arguments.limit)
        say(arguments, list_text(cells))
        return {"study": asked.name, "cells": cells}
    result = compare.compare(
        job,
        shown(arguments),
        seeds=seeds,
        only=arguments.only,
        limit_s=arguments.limit,
        say=lambda text: arguments.quiet or print(text, file=sys.stderr, flush=True),
    )
    say(arguments, (out / "table.md").read_text(encoding="utf-8"))
    return refused(compare.check, result)


def seeds_of(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or any(not 0 <= seed < 2**31 for seed in seeds):
        raise ConfigError(f"--seeds {text} are no seeds: give whole numbers from 0, as --seeds 3,4")
    return list(dict.fromkeys(seeds))


def list_text(cells: list[dict[str, Any]]) -> str:
    from mitrain.training.telemetry import duration

    def time(cell: dict[str, Any]) -> str:
        return ("took " if cell["done"] else "at most " if cell["at_most"] else "about ") + duration(cell["seconds"])

    width = max((len(cell["cell"]) for cell in cells), default=0)
    lines = [f"{cell['cell']:<{width}}  {time(cell)}" for cell in cells]
    left = sum(cell["seconds"] for cell in cells if not cell["done"])
    done = sum(cell["done"] for cell in cells)
    return "\n".join([*lines, f"{len(cells)} cells, {done} finished; the others take at most or about {duration(left)}"])


def shown(arguments: argparse.Namespace) -> str:
    """The command that makes these results again; further seeds are named by the rows themselves."""
    words = ["mitrain compare", arguments.study]
    words += ["--out", arguments.out] if arguments.out else []
    words += ["--limit", f"{arguments.limit:g}"] if arguments.limit else []
    return " ".join(words)
