"""``mitrain report``, ``mitrain export``, ``mitrain push``: what runs are shown as, and what is given away of one."""

import argparse
from pathlib import Path
from typing import Any

from mitrain.cli.shared import add_checkpoint, add_trust, describe, say
from mitrain.core.errors import ConfigError

REPORTING = """  mitrain report runs/birds-TIME --out report --splits val,test
"""
EXPORTING = """  mitrain export runs/birds-TIME --out my-adapter --splits test   with its score on test in the model card
  mitrain export runs/lora-TIME --out models --merge              whole models, without an adapter
"""
PUSHING = """  mitrain push my-adapter USER/NAME --license apache-2.0
"""


def add_report(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_report, REPORTING)
    sub.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="runs of one task; runs of one name and several seeds are averaged"
    )
    sub.add_argument(
        "--out", metavar="DIR", help="where the HTML, Markdown, JSON and PNG files go (default: a single run's folder)"
    )
    sub.add_argument("--splits", default="test", help="comma-separated splits to score (default: test)")
    sub.add_argument("--samples", type=int, metavar="N", help="score N samples spread evenly over each split")
    add_trust(sub)


def run_report(arguments: argparse.Namespace) -> Any:
    from mitrain.inference.report import report

    if not arguments.out and len(arguments.run_dirs) > 1:
        raise ConfigError("several runs are reported together: give a folder for the files with --out")
    out = Path(arguments.out or arguments.run_dirs[0])
    quiet = arguments.json or arguments.quiet
    result = report(arguments.run_dirs, out, arguments.splits.split(","), arguments.samples, quiet=quiet)
    say(arguments, f"the page: {out / 'report.html'}")
    say(arguments, result["markdown"])
    return result


def add_export(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_export, EXPORTING)
    sub.add_argument("run_dir", metavar="RUN_DIR", help="a run folder, as runs/NAME-TIME")
    sub.add_argument("--out", required=True, metavar="DIR", help="a new folder; nothing is ever replaced")
    add_checkpoint(sub)
    sub.add_argument(
        "--splits", default="", metavar="A,B,…", help="splits to score now for the model card (val's score is known)"
    )
    sub.add_argument("--samples", type=int, metavar="N", help="score N samples spread evenly over each split")
    add_trust(sub)
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


def add_push(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_push, PUSHING)
    sub.add_argument("folder", metavar="EXPORT", help="a folder that mitrain export wrote")
    sub.add_argument("name", metavar="USER/NAME", help="the repository on the Hub; created if it is not there")
    sub.add_argument("--private", action="store_true", help="make a private repository")
    sub.add_argument("--license", metavar="ID", help="the adapter's licence by its name on the Hub, e.g. apache-2.0")
    sub.add_argument("--base", metavar="USER/NAME", help="the language model on the Hub, if the export names a folder")
    sub.add_argument(
        "--encoder",
        action="append",
        metavar="USER/NAME",
        help="an encoder on the Hub, likewise; for several encoders once each, in their order",
    )
    sub.add_argument(
        "--answers",
        action="store_true",
        help="also publish the training answers and class names of your own data (default: not)",
    )


def run_push(arguments: argparse.Namespace) -> Any:
    from mitrain.inference.hub import push_to_hub

    options = {name: getattr(arguments, name) for name in ("private", "license", "base", "answers")}
    url = push_to_hub(arguments.folder, arguments.name, encoders=arguments.encoder, **options)
    say(arguments, f'pushed to {url}; in Python: mitrain.from_pretrained("{arguments.name}")')
    return {"repository": arguments.name, "url": url}


def run_merge(arguments: argparse.Namespace) -> Any:
    from mitrain.inference.merge import export_merged

    if arguments.splits or arguments.samples:
        raise ConfigError("--merge writes no model card: leave out --splits and --samples")
    made = export_merged(arguments.run_dir, arguments.out, arguments.checkpoint)
    say(arguments, f"merged step {made['step']} into {made['folder']}: {', '.join(made['files'])}")
    return made
