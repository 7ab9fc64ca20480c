"""``mitrain report`` and ``mitrain export``: what finished runs are shown as, and what is given away of one."""

import argparse
from pathlib import Path
from typing import Any

from mitrain.cli.shared import add_checkpoint, command, say
from mitrain.core.errors import ConfigError


def add_report(commands: Any) -> None:
    sub = command(commands, "report", run_report, "make the tables and figures of finished runs")
    sub.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="runs of one task; the same name with other seeds is averaged"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="where the Markdown, JSON and PNG files are written")
    sub.add_argument("--splits", default="test", help="comma-separated splits to score (default: test)")
    sub.add_argument("--samples", type=int, metavar="N", help="score N samples spread evenly over each split")


def run_report(arguments: argparse.Namespace) -> Any:
    from mitrain.inference.report import report

    result = report(
        arguments.run_dirs, Path(arguments.out), arguments.splits.split(","), arguments.samples, quiet=arguments.json
    )
    say(arguments, result["markdown"])
    return result


def add_export(commands: Any) -> None:
    sub = command(commands, "export", run_export, "write a run's adapter to a folder that others can load")
    sub.add_argument("run_dir", metavar="RUN_DIR", help="a run folder, as runs/NAME-TIME")
    sub.add_argument("--out", required=True, metavar="DIR", help="a new folder; nothing is ever replaced")
    add_checkpoint(sub)
    sub.add_argument(
        "--splits", default="", metavar="A,B,…", help="splits to score now for the model card (val's score is known)"
    )
    sub.add_argument("--samples", type=int, metavar="N", help="score N samples spread evenly over each split")
    sub.add_argument(
        "--merge", action="store_true", help="fold the adapter into the frozen weights and write whole models instead"
    )


def run_export(arguments: argparse.Namespace) -> Any:
    if arguments.merge:
        return run_merge(arguments)
    from mitrain.inference.export import export

    splits = [split.strip() for split in arguments.splits.split(",") if split.strip()]
    made = export(arguments.run_dir, arguments.out, arguments.checkpoint, splits, arguments.samples)
    say(arguments, f"exported step {made['step']} to {made['folder']}: {', '.join(made['files'])}")
    say(arguments, f'in Python: mitrain.from_pretrained("{made["folder"]}").predict(image, text)')
    return made


def run_merge(arguments: argparse.Namespace) -> Any:
    from mitrain.inference.merge import export_merged

    if arguments.splits or arguments.samples:
        raise ConfigError("--merge writes no model card: leave out --splits and --samples")
    made = export_merged(arguments.run_dir, arguments.out, arguments.checkpoint)
    say(arguments, f"merged step {made['step']} into {made['folder']}: {', '.join(made['files'])}")
    return made
