"""``mitrain report``: what finished runs are shown as."""

import argparse
from pathlib import Path
from typing import Any

from mitrain.cli.shared import command, say


def add_report(commands: Any) -> None:
    sub = command(commands, "report", run_report, "make the tables and figures of finished runs")
    sub.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="runs of one task; the same name with other seeds is averaged"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="where the Markdown, JSON and PNG files are written")
    sub.add_argument("--splits", default="test", help="comma-separated splits to score (default: test)")
    sub.add_argument("--samples", type=int, metavar="N", help="score N samples spread evenly over each split")


def run_report(arguments: argparse.Namespace) -> Any:
    from mitrain.report import report

    result = report(
        arguments.run_dirs, Path(arguments.out), arguments.splits.split(","), arguments.samples, quiet=arguments.json
    )
    say(arguments, result["markdown"])
    return result
