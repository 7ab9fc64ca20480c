"""``mitrain chat``: questions to a run, one after another, in a terminal or from a pipe."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mitrain.cli.ask import add_opening, add_run, choices_of, files_of, opening_of
from mitrain.cli.shared import describe, generation_of, say
from mitrain.core import glance
from mitrain.core.errors import ConfigError, UserError, nearest

EXAMPLES = """  mitrain chat runs/quickstart-TIME --image photo.jpg
  printf ':image a.png\\nThe thing in this picture is\\n' | mitrain chat my-adapter
"""
WORDS = ":image FILE, :sound FILE or :NAME FILE gives an input, :quit ends it; every other line is asked about these files"
KINDS = {"image": "image", "picture": "image", "sound": "audio", "audio": "audio", "video": "video"}


def add_chat(sub: argparse.ArgumentParser) -> None:
    describe(sub, run_chat, EXAMPLES)
    add_run(sub)
    sub.add_argument("--image", metavar="FILE", help="the first picture: short for --input image=FILE")
    sub.add_argument("--input", action="append", default=[], metavar="NAME=FILE", help="the first file of an input")
    sub.add_argument("--candidates", metavar="A,B,…", help="answers to choose among (default: the training answers)")
    add_opening(sub)


def run_chat(arguments: argparse.Namespace) -> list[Any]:
    files = files_of(arguments, none=True)
    from mitrain.inference.scoring import ask
    from mitrain.training import runs

    run = runs.open_run(arguments.run_dir, **opening_of(arguments))
    takes = {section.input: section.takes for section in run.config.model.encoders.values()}
    print(f"mitrain: {run.config.name} reads {', '.join(takes)}; {WORDS}", file=sys.stderr)
    answers = []
    for line in lines():
        try:
            if line.startswith(":"):
                name, file = given(line, takes)
                files = {**files, name: file}
                continue
            answer = ask(run, files, line, candidates=choices_of(arguments), generation=generation_of(arguments))
        except UserError as error:
            print(f"mitrain: {error}", file=sys.stderr)
            arguments.code = 0 if asked_by_hand() else error.exit_code  # a script is to notice
            continue
        answers.append(answer.values)
        for shown in answer.lines:
            say(arguments, shown)
        sys.stdout.flush()
    return answers


def asked_by_hand() -> bool:
    return bool(sys.stdin) and sys.stdin.isatty()


def lines() -> Iterator[str]:
    """What is typed or piped, without empty lines, until :quit or the end; a half character stays one, to be refused."""
    if asked_by_hand():
        import readline  # noqa: F401 - input() lets lines be edited and called back
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> " if asked_by_hand() else "").strip()
        except (EOFError, RuntimeError):  # RuntimeError: there is no standard input
            return
        if line in (":quit", ":q", ":exit"):
            return
        if line:
            yield line


def given(line: str, takes: Mapping[str, str]) -> tuple[str, str]:
    """The input that ``:NAME FILE`` gives, and its file; a kind of file stands for the run's only input of that kind."""
    word, _, file = line[1:].partition(" ")
    file = file.strip()
    alike = [name for name, kind in takes.items() if kind == KINDS.get(word)]
    name = word if word in takes else alike[0] if len(alike) == 1 else None
    if name is None:
        known = [*takes, *(word for word, kind in KINDS.items() if kind in takes.values()), "quit"]
        raise ConfigError(f":{word} means nothing here{nearest(word, known)}: {WORDS}")
    if not file:
        raise ConfigError(f":{word} has no file: write :{word} FILE")
    glance.files([file])
    return name, str(Path(file).expanduser())
