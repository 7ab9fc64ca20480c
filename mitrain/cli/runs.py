"""``mitrain runs``: the runs in a folder, and what differs between some of them."""

import argparse
from pathlib import Path
from typing import Any

from mitrain.cli.shared import describe, say

EXAMPLES = """  mitrain runs                                   every run in runs/
  mitrain runs runs/birds-A runs/birds-B --diff  the settings that differ between two
"""


def add_runs(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_runs, EXAMPLES)
    sub.add_argument(
        "folders", nargs="*", default=["runs"], metavar="DIR", help="run folders, or folders that hold some (default: runs)"
    )
    sub.add_argument("--diff", action="store_true", help="also show the settings that differ between them")


def run_runs(arguments: argparse.Namespace) -> Any:
    from mitrain.training import listing

    found = listing.listed([Path(folder) for folder in arguments.folders])
    differing = listing.settings_that_differ(found) if arguments.diff else {}
    say(arguments, listing.table(found))
    if arguments.diff:
        say(arguments, "\n" + listing.comparison(found, differing))
    shown = [{key: value for key, value in run.items() if key != "config"} for run in found]
    return {"runs": shown, "differing": differing} if arguments.diff else shown
