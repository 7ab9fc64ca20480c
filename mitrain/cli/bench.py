"""``mitrain bench NAME``: the benchmarks, which lie in the repository and not in the wheel."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import NoReturn

from mitrain.core.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def add_bench(sub: argparse.ArgumentParser) -> None:
    if not (REPOSITORY / "benchmarks" / "command.py").is_file():
        sub.add_argument("words", nargs=argparse.REMAINDER, metavar="NAME")
        sub.set_defaults(run=refuse, json=False, parser=sub, verbose=False, quiet=False)
        return
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))
    command = importlib.import_module("benchmarks.command")  # by its name: no import of the library leads out of it
    command.add_benchmarks(sub.add_subparsers(dest="verb", required=True, metavar="NAME"))


def refuse(arguments: argparse.Namespace) -> NoReturn:
    raise ConfigError(
        "the benchmarks are in the folder benchmarks/ of mitrain's repository, and not in the installed package:"
        " run mitrain from a clone"
    )
