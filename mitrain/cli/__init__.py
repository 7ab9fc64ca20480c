"""The command line: ``mitrain COMMAND …``, each command a module of this package.

Results go to stdout (with ``--json`` one JSON document and nothing else), progress and notices to stderr. The user's
own mistakes end in one line and exit code 2, a signal in one line and 128 + its number (after the first step `train`
saves, and ends with 75, to be run again, where it was not Ctrl-C); anything else is a bug and shows its traceback.
"""

import argparse
import atexit
import contextlib
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from mitrain.cli.commands import COMMANDS, overview
from mitrain.cli.shared import Help, Parser, glance, title, trust
from mitrain.core import allocator, terminal
from mitrain.core.errors import UserError, is_out_of_memory
from mitrain.core.files import remedy
from mitrain.core.version import __version__
from mitrain.training.guard import Interruptible

atexit.register(gc.freeze)  # the interpreter's last collections of torch's modules took 2 s, after all was done
SMALLER = "lower train.batch, train.eval_batch or the data's picture size, take more ranks, or set model.quantize=int8"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["bench"]:
        from mitrain.cli.bench import bench

        return bench(words[1:])
    return started(lambda: parser(words).parse(words))


def started(parse: Callable[[], argparse.Namespace]) -> int:
    """Run the command that ``parse`` finds on the command line; returns the exit code."""
    with terminal.safe(), Interruptible():
        try:
            return run(parse())
        except KeyboardInterrupt as error:
            number = getattr(error, "number", signal.SIGINT)
            with contextlib.suppress(OSError):  # a terminal that was closed
                print(f"mitrain: stopped by {signal.Signals(number).name}", file=sys.stderr)
            return 128 + number


def run(arguments: argparse.Namespace) -> int:
    arguments.rank, arguments.code = 0, 0
    allocator.keep_freed()
    logs = logging.StreamHandler(sys.stderr)
    logs.setFormatter(terminal.OneLine("mitrain: %(message)s"))
    logging.basicConfig(level=logging.ERROR if arguments.quiet else logging.WARNING, handlers=[logs])
    if arguments.verbose:
        for name in ("mitrain", "mitrain_kernels"):
            logging.getLogger(name).setLevel(logging.INFO)
    try:
        trust(arguments)
        glance(arguments)
        with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
            result = arguments.run(arguments)  # stdout is the document's alone; DeepSpeed logs there
        if arguments.json and result is not None and not arguments.rank:
            print(as_json(result))
        if sys.stdout:  # None where the caller closed it
            sys.stdout.flush()
        return arguments.code
    except UserError as error:
        complain(arguments, error, str(error))
        if arguments.json and not arguments.rank and getattr(error, "document", None) is not None:
            print(as_json(error.document))
        return error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        place = f" {error.filename!r}" if error.filename else ""
        complain(arguments, error, f"cannot read or write{place} ({error.strerror or error}): {remedy(error)}")
        return UserError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        complain(arguments, error, f"out of memory ({reason(error)}): {SMALLER}")
        return UserError.exit_code


def complain(arguments: argparse.Namespace, error: Exception, text: str) -> None:
    """An error's line; of several ranks each names itself, and one that passes on rank 0's error is silent."""
    if not getattr(error, "reported", False):
        with contextlib.suppress(OSError):  # a terminal that was closed
            who = f"mitrain, rank {arguments.rank}" if arguments.rank else "mitrain"
            print(f"{who}: {text}\n", end="", file=sys.stderr)  # in one write: ranks share the terminal


def reason(error: Exception) -> str:
    """What was asked for, as far as the error says it: its first line, without torch's place in its sources."""
    lines = str(error).rpartition("] ")[2].splitlines()
    return lines[0][:120].rstrip(".") if lines else "no reason given"


def as_json(value: Any) -> str:
    """Valid JSON: a number that is not finite (the best score before the first evaluation) is null."""
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    except ValueError:
        from mitrain.training.telemetry import plain

        return json.dumps(plain(value), indent=2, sort_keys=True, allow_nan=False)


def parser(words: Sequence[str] | None = None) -> Parser:
    """Of all commands; with ``words`` only the command in them has its options, and only its module is imported."""
    top = Parser(
        prog="mitrain",
        usage="mitrain [-h] [--version] COMMAND ...",
        description="Make a frozen language model see and hear, by training a small adapter beside it.",
        epilog=overview(),
        formatter_class=Help,
    )
    top.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK counts
    top.add_argument("--version", action="version", version=f"mitrain {__version__}")
    commands = top.add_subparsers(dest="command", prog="mitrain", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    known = {name: one for group in COMMANDS.values() for name, one in group.items()}
    asked = known if words is None else [next((word for word in words if word in known), None)]
    for name, (place, text) in known.items():
        sub = commands.add_parser(name, help=text, description=title(text), formatter_class=Help)
        if name in asked:
            module, _, function = place.partition(":")
            getattr(import_module(f"mitrain.cli.{module}"), function)(sub)
    return top
