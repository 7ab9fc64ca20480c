"""``mitrain completion SHELL``: commands, options and files completed by the shell, without starting Python."""

import argparse
from collections.abc import Iterator
from typing import Any

from mitrain.cli.shared import describe, say
from mitrain.core.errors import need_extra

EXAMPLES = """  mitrain completion bash > ~/.local/share/bash-completion/completions/mitrain
  mitrain completion zsh > ~/.zfunc/_mitrain
"""


def add_completion(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_completion, EXAMPLES)
    sub.add_argument("shell", choices=["bash", "zsh", "tcsh", "fish"], help="the shell that is to complete")


def run_completion(arguments: argparse.Namespace) -> Any:
    shtab = need_extra("shtab", "completion", "mitrain completion")
    from mitrain.cli import parser

    top = parser()
    for action in actions(top):
        if isinstance(action, argparse._SubParsersAction):
            action.help = None  # mitrain --help lists the commands in its own way, and shtab would leave out what is hidden
        if action.metavar in ("FILE", "PATH") or action.dest in ("config", "study"):
            action.complete = shtab.FILE
        elif action.metavar in ("DIR", "RUN_DIR", "EXPORT"):
            action.complete = shtab.DIRECTORY
    script = shtab.complete(top, arguments.shell)
    say(arguments, script)
    return {"shell": arguments.shell, "script": script}


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every option and argument of every command."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from actions(sub)
