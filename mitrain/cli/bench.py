"""``mitrain bench NAME``: the benchmarks, which lie in the repository and not in the wheel."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from mitrain.core.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def add_bench(commands: Any) -> None:
    text = "benchmarks: parity of shards, faults, loading, steps, encoding, kernels, and the papers' claims"
    group = commands.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".")
    if not (REPOSITORY / "benchmarks" / "command.py").is_file():
        group.add_argument("words", nargs=argparse.REMAINDER, metavar="NAME")
        group.set_defaults(run=refuse, json=False)
        return
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))
    from benchmarks.command import add_benchmarks

    add_benchmarks(group.add_subparsers(dest="verb", required=True, metavar="NAME"))


def refuse(arguments: argparse.Namespace) -> NoReturn:
    raise ConfigError(
        "the benchmarks are in the folder benchmarks/ of mitrain's repository, and not in the installed package:"
        " run mitrain from a clone"
    )
