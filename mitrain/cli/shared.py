"""What every command needs: its parser, its ranks, and a way to speak."""

import argparse
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mitrain.core.errors import UserError, nearest


class Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        said = action.default in (None, False, "", [], argparse.SUPPRESS) or "default" in text
        return text if said else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with what may have been meant, and key=value wherever it stands among the options."""

    def error(self, message: str) -> NoReturn:
        self.exit(UserError.exit_code, f"mitrain: {message}: see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        hint = nearest(str(value), map(str, action.choices))
        if isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(None, f"no command {value!r}{hint} among {', '.join(action.choices)}")
        choice = ", ".join(map(str, action.choices))
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}: choose from {choice}")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """argparse takes the positional arguments behind an option for unknown ones."""
        arguments, rest = self.parse_known_args(argv)
        unknown = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in arguments]
        if unknown:
            sub = arguments.parser
            hint = nearest(unknown[0].partition("=")[0], sub._option_string_actions) if unknown[0][0] == "-" else ""
            sub.error(f"{' '.join(unknown)} means nothing to {sub.prog}{hint}")
        if rest:
            arguments.overrides = [*arguments.overrides, *rest]
        return arguments


def title(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def command(commands: Any, name: str, run: Any, text: str, examples: str = "") -> argparse.ArgumentParser:
    """A command below another one, as ``mitrain data list``."""
    sub = commands.add_parser(name, help=text, description=title(text), formatter_class=Help)
    return describe(sub, run, examples)


def describe(sub: argparse.ArgumentParser, run: Any, examples: str = "") -> argparse.ArgumentParser:
    """What every command has: what it runs, its examples (a command line each), and the options of all."""
    sub.epilog = f"examples:\n{examples}" if examples else None
    sub.add_argument(
        "--json", action="store_true", help="print the result as one JSON document on stdout, and nothing else there"
    )
    said = sub.add_mutually_exclusive_group()
    said.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also print what is decided along the way, e.g. which kernels run, and why",
    )
    said.add_argument("-q", "--quiet", action="store_true", help="print only results and errors: no progress, no warnings")
    sub.set_defaults(run=run, parser=sub)
    return sub


def on_ranks(run: Callable[[argparse.Namespace], Any]) -> Callable[[argparse.Namespace], Any]:
    """A command that all ranks run together, where there are several; rank 0 speaks."""

    def joined(arguments: argparse.Namespace) -> Any:
        # Before torch is imported: it warns of every lost connection, which we say in a line of our own.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from mitrain.core import dist, launchers
        from mitrain.training import fingerprint

        arguments.rank = dist.rank_info().rank
        if dist.names_set(os.environ):
            launchers.end_with_launcher()
        if arguments.rank:  # rank 0 speaks for all
            logging.getLogger().setLevel(logging.ERROR)
        with dist.process_group():
            if dist.world() > 1:
                fingerprint.require_same(asked(arguments) | fingerprint.code_parts())
            return run(arguments)

    return joined


def glance(arguments: argparse.Namespace) -> None:
    """Refuse what is plainly wrong before torch is imported, which takes seconds."""
    if os.environ.keys() & {"RANK", "SLURM_PROCID"}:  # there rank 0 reads it and speaks for all
        return
    given = vars(arguments)
    runs = [given.get("run_dir") or given.get("resume"), *given.get("run_dirs", ())]
    from mitrain.core import glance

    if "candidates" in given:
        glance.words(given.get("text", ""), (given["candidates"] or "").split(","))
    for run in filter(None, runs):
        glance.run_folder(run)
    if not any(runs) and given.get("config") and "overrides" in given:
        loads = arguments.command == "train" and not arguments.dry_run
        glance.look(arguments.config, arguments.overrides, loads)
    if given.get("resume"):
        changes = [*filter(None, [arguments.config]), *arguments.overrides]
        look_at_resumed(arguments, changes)


def look_at_resumed(arguments: argparse.Namespace, changes: Sequence[str]) -> None:
    from mitrain.core import glance

    own = Path(arguments.resume, "config.yaml")
    if not own.is_file() or any("=" not in change for change in changes):
        return  # whoever reads it says so
    if not arguments.allow_changes:
        glance.resume_overrides(changes)
    glance.look(str(own), changes)


def asked(arguments: argparse.Namespace) -> dict[str, str]:
    """The command and its arguments, but what only concerns how this process speaks."""
    shown = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("run", "rank", "code", "json", "local_rank", "parser", "verbose", "quiet")
    }
    return {f"arguments.{name}": json.dumps(value) for name, value in sorted(shown.items())}


def say(arguments: argparse.Namespace, text: str) -> None:
    """A line for people: on stdout, or nowhere when the output is JSON."""
    if not arguments.json and not arguments.rank:
        print(text)


def add_checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint", default="best", choices=["best", "latest"], help="which checkpoint of the run (default: best)"
    )


GENERATION = {"max_new_tokens": int, "beams": int, "temperature": float, "top_p": float}


def add_generation(sub: argparse.ArgumentParser) -> None:
    """Options that change how the model speaks; what is not given stays as the run's configuration has it."""
    for name, meaning in (
        ("max_new_tokens", "maximum number of generated tokens"),
        ("beams", "number of beams in beam search; 1: greedy"),
        ("temperature", "sampling temperature; 0: no sampling"),
        ("top_p", "nucleus sampling: draw from the likeliest tokens up to this probability"),
    ):
        option = f"--{name.replace('_', '-')}"
        sub.add_argument(option, type=GENERATION[name], metavar="N", help=f"{meaning} (default: as the run says)")


def generation_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the task that options of `add_generation` give."""
    given = {name: getattr(arguments, name) for name in GENERATION}
    return {name: value for name, value in given.items() if value is not None}


def trust(arguments: argparse.Namespace) -> None:
    """A configuration that a command is given may name code of the user's; a run or an export only with --trust-code."""
    given = vars(arguments)
    folder, asked = given.get("trust_code"), given.get("config") or given.get("study")
    if folder is None and asked and not given.get("resume") and arguments.command in ("train", "plan", "compare"):
        folder = Path(asked).parent
    if folder is not None:
        from mitrain.core import user_code

        user_code.trust(folder)


def add_trust(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--trust-code",
        metavar="FOLDER",
        help="let the run call its own task.metric and task.loss: Python code in FOLDER or on PYTHONPATH",
    )


def refused(check: Callable[[Any], None], document: Any) -> Any:
    """``document``; where ``check`` refuses it, the error takes it along to be printed as JSON all the same."""
    try:
        check(document)
    except UserError as error:
        error.document = document
        raise
    return document
