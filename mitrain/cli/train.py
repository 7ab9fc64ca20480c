"""``mitrain train``: a new run, a resumed one, or the count of what one would take."""

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from mitrain.cli.shared import add_trust, describe, on_ranks, say
from mitrain.core.errors import ConfigError, UserError

EXAMPLES = """  mitrain train quickstart                                a shipped configuration; mitrain config names them
  mitrain train birds.yaml train.epochs=5 train.lr=3e-4   your own, which mitrain init wrote, with other settings
  mitrain train birds.yaml --dry-run                      count parameters and bytes, without weights or data
  mitrain train birds.yaml --run-dir runs/birds           made if it is not there, else resumed: for job scripts
"""
RESUMING = """  mitrain resume runs/quickstart-TIME                     bit for bit as if it had not been stopped
  mitrain resume runs/quickstart-TIME train.steps=400 --allow-changes     a finished run, for longer
"""


def add_train(sub: argparse.ArgumentParser) -> None:
    describe(sub, on_ranks(run_train), EXAMPLES)
    sub.add_argument("config", nargs="?", help="a YAML file or a shipped configuration's name, as quickstart")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100 model.dtype=bf16")
    sub.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="continue this run from its newest usable checkpoint; key=value may change its ranks, e.g. zero.stage=1",
    )
    sub.add_argument(
        "--allow-changes",
        action="store_true",
        help="with --resume or --run-dir: continue though configuration, data or frozen weights differ from the"
        " checkpoint's, e.g. train.steps=400; each difference is printed",
    )
    sub.add_argument("--runs", default="runs", metavar="DIR", help="where new run folders are made (default: runs)")
    sub.add_argument(
        "--run-dir",
        dest="at",
        metavar="RUN_DIR",
        help="the run's own folder: created if it is not there, else resumed (for job scripts)",
    )
    sub.add_argument("--dry-run", action="store_true", help="only count parameters and bytes; needs no weights and no data")
    sub.add_argument(
        "--profile", action="store_true", help="write a Chrome trace and a summary of steps 3 to 5 to RUN_DIR/profile"
    )
    sub.add_argument("--ranks", type=int, default=1, help="with --dry-run: number of ranks (default: 1)")
    add_trust(sub)


def add_resume(sub: argparse.ArgumentParser) -> None:
    describe(sub, on_ranks(run_train), RESUMING)
    sub.set_defaults(config=None, runs="runs", at=None, dry_run=False, ranks=1, profile=False)
    sub.add_argument("resume", metavar="RUN_DIR", help="the run folder, as runs/NAME-TIME")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, e.g. zero.stage=1")
    sub.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue though configuration, data or frozen weights differ from the checkpoint's, e.g. train.steps=400;"
        " each difference is printed",
    )
    add_trust(sub)


def run_train(arguments: argparse.Namespace) -> Any:
    from mitrain.core import dist
    from mitrain.core.ownership import owned
    from mitrain.training import runs

    if arguments.dry_run and not arguments.resume and arguments.config:
        return run_dry(arguments)
    folder, config = dist.from_main(lambda: resolve_run(arguments))
    if not arguments.quiet:
        dist.say(f"run folder: {folder}", file=sys.stderr)
    with owned(folder):
        if arguments.at:  # until now another job could begin the folder, or remove it
            dist.from_main(lambda: runs.create_or_find(config, folder, arguments.allow_changes))
        trainer, outcome = fitted(arguments, folder, config)
    if not arguments.rank and not outcome.stopped:
        from mitrain.inference.webpage import write_page

        write_page(folder)
    say(arguments, trainer.watch.table())
    bad = len(trainer.features.bad)
    skipped = f" ({bad} bad samples skipped)" if bad else ""
    if outcome.stopped:
        arguments.code = outcome.exit_code
        say(
            arguments,
            f"stopped by {outcome.stopped} after step {outcome.step}{skipped}: mitrain train --resume {folder}",
        )
        end_together()
    else:
        say(
            arguments,
            f"{f'ended after step {outcome.step}: {outcome.ended}; ' if outcome.ended else ''}best val {outcome.best:.4f} at"
            f" step {outcome.best_step}{skipped}; next: mitrain eval {folder} --split test",
        )
    return {
        "run": str(folder),
        "step": outcome.step,
        "best": outcome.best,
        "best_step": outcome.best_step,
        "stopped": outcome.stopped,
        "ended": outcome.ended,
        "bad_samples": bad,
    }


def end_together() -> None:
    """Wait until every rank has come to its end, and let none be asked again: launchers end all ranks as soon as one ends
    with a code that is not 0, and rank 0 may have trackers to close."""
    from mitrain.core import dist
    from mitrain.training.guard import STOP_SIGNALS

    dist.barrier()
    for number in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
        signal.signal(number, signal.SIG_IGN)


def fitted(arguments: argparse.Namespace, folder: Path, config: Any) -> tuple[Any, Any]:
    """The trainer and its outcome; the folder of a new run that is refused before its first step is removed."""
    from mitrain.core import dist, memory
    from mitrain.training import runs
    from mitrain.training.state import recorded
    from mitrain.training.trainer import Trainer

    try:
        with recorded(folder) as state, memory.watched(state.failed):
            quiet = arguments.json or arguments.quiet
            trainer = Trainer(config, folder, quiet=quiet, allow_changes=arguments.allow_changes)
            watched = profiled(trainer, folder) if arguments.profile else None
            outcome = trainer.fit()
            if watched and dist.is_main():
                say(arguments, watched.told())
            return trainer, outcome
    except UserError:
        if dist.is_main() and not arguments.resume:
            runs.remove_unstarted(folder)
        raise


def profiled(trainer: Any, folder: Path) -> Any:
    from mitrain.training.profiling import Profiled

    return Profiled(trainer, folder / "profile")


def resolve_run(arguments: argparse.Namespace) -> tuple[Path, Any]:
    """The run folder, new or the one to resume, and its configuration."""
    from mitrain.training import runs, schema
    from mitrain.training.build import resolved

    if arguments.resume:
        changes = [*filter(None, [arguments.config]), *arguments.overrides]
        if arguments.at or arguments.dry_run or any("=" not in change for change in changes):
            raise ConfigError("--resume takes the run folder's own configuration: leave out CONFIG, --run-dir and --dry-run")
        config = schema.with_resume_overrides(runs.read_config(arguments.resume), changes, arguments.allow_changes)
        return runs.require_started(arguments.resume), config
    if not arguments.config:
        raise ConfigError("give a configuration (quickstart is one; mitrain config names the others) or --resume RUN_DIR")
    config = resolved(schema.load(arguments.config, arguments.overrides))
    if arguments.at:
        return runs.create_or_find(config, arguments.at, arguments.allow_changes), config
    return runs.create(config, arguments.runs), config


def run_dry(arguments: argparse.Namespace) -> Any:
    from mitrain.training import schema
    from mitrain.training.dryrun import dry_run

    config = schema.load(arguments.config, arguments.overrides)
    report = dry_run(config, arguments.ranks)
    say(arguments, report.text())
    return report.to_dict()
