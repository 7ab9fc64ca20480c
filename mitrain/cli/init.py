"""``mitrain init``: a configuration for a user's own table."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mitrain.cli.shared import describe, say
from mitrain.core.errors import ConfigError

EXAMPLES = """  mitrain init --data photos.csv                      the columns are looked at: files, labels, texts
  mitrain init regress --data clips/train.csv         val.csv and test.csv beside it are used, too
  mitrain init --data all.csv --files my/photos --column label=species
"""


def add_init(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_init, EXAMPLES)
    tasks = ["answer", "classify", "regress", "caption", "retrieve", "segment"]
    sub.add_argument("task", nargs="?", choices=tasks, help="the task (default: guessed from the columns)")
    sub.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="a table with one sample per row (CSV, TSV, JSONL, JSON), a folder with a subfolder for each class, LLaVA's or"
        " ShareGPT's JSON, or COCO's JSON with referring expressions",
    )
    sub.add_argument("--files", metavar="DIR", help="the folder that paths in the table are relative to")
    sub.add_argument(
        "--column", action="append", default=[], metavar="FIELD=NAME", help="which column holds a field, e.g. label=species"
    )
    sub.add_argument(
        "--llm", metavar="MODEL", help="the language model: a prepared one's name, a folder or a Hugging Face id"
    )
    sub.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="the encoder of an input, likewise, e.g. image=DIR",
    )
    sub.add_argument("--out", metavar="FILE", help="the configuration to write (default: the table's name with .yaml)")


def run_init(arguments: argparse.Namespace) -> Any:
    from mitrain.training.starter import begin

    made = begin(
        Path(arguments.data),
        Path(arguments.out) if arguments.out else None,
        arguments.task,
        pairs("--column", arguments.column),
        Path(arguments.files) if arguments.files else None,
        arguments.llm,
        pairs("--encoder", arguments.encoder),
    )
    for line in told(made):
        say(arguments, line)
    return made


def told(made: Mapping[str, Any]) -> list[str]:
    """What was found, a line each, and the next command."""
    named = {column: field for field, column in made["columns"].items() if column in made["inputs"]}
    own = {column: kind if kind == column else f"{column} ({kind} files)" for column, kind in made["inputs"].items()}
    inputs = [f"{named[column]} from column {column!r}" if column in named else own[column] for column in own]
    learned = [f"{field} from column {name!r}" for field, name in made["columns"].items() if name not in named]
    lines = [
        f"task: {made['task']}",
        f"samples: {', '.join(f'{count} {split}' for split, count in made['samples'].items())}",
        f"inputs: {', '.join(inputs)}",
        *([f"beside them: {', '.join(learned)}"] if learned else []),
    ]
    if made["unused"]:
        lines.append(f"columns that are not used: {', '.join(made['unused'])} (--column FIELD=NAME takes one)")
    config = made["config"]
    return [*lines, f"wrote {config}; next: mitrain data inspect {config}, then mitrain train {config}"]


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE options as a mapping."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not (name and equals and value) or name in found:
            raise ConfigError(f"{option} {one}: write NAME=VALUE, each name once")
        found[name] = value
    return found
