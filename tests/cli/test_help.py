"""Every help as a stranger reads it: what it does, an example, every option explained, defaults shown."""

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from benchmarks import command
from mitrain.cli import main, parser
from mitrain.cli.commands import COMMANDS

LONGEST = 70  # lines of a help


def commands(of: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers that run something."""
    groups = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for sub in group.choices.values():
            yield from commands(sub)
    if not groups:
        yield of


OURS = {sub.prog: sub for sub in commands(parser())}
ALL = OURS | {sub.prog: sub for sub in commands(command.parser())}
EXAMPLES = [
    (name, line.strip())
    for name, sub in ALL.items()
    for line in (sub.epilog or "").splitlines()
    if line.strip().startswith("mitrain ")
]


@pytest.mark.parametrize("name", ALL)
def test_help_is_short_and_says_what_it_does(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run = main if name in OURS else command.main
        run([*name.removeprefix("mitrain ").removeprefix("bench ").split(), "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.count("\n") < LONGEST
    assert shown.startswith(f"usage: {name} ") and re.search(r"\n\n[A-Z][^\n]{15,}", shown)


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_explained_with_its_default(name):
    for action in ALL[name]._actions:
        assert action.help, f"{name} {action.option_strings or action.dest} has no help"
        shown = ALL[name]._get_formatter()._expand_help(action)
        if action.option_strings and action.default not in (None, False, 0, "", [], argparse.SUPPRESS):
            assert "default" in shown, f"{name} {action.option_strings}: {shown}"


@pytest.mark.parametrize("name", OURS)
def test_every_help_has_an_example(name):
    assert "examples:\n" in (ALL[name].epilog or ""), name


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_every_example_is_understood(name, line):
    command = re.split(r"\s{2,}| [|>]", line)[0]  # what stands behind it says what it is for
    words = shlex.split(command)[1:]
    found = parser(words).parse(words)
    assert callable(found.run) and found.parser.prog == name


def test_the_overview_names_every_command_once(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for group in COMMANDS.values():
        for name in group:
            assert len(re.findall(rf"^  {name} ", shown, re.M)) == 1
    assert "bench" not in shown  # of a clone alone
    assert max(map(len, shown.splitlines())) <= 112
