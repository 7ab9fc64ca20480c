"""What a person sees: text from data, names and errors cannot steer the terminal, whatever it holds."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but tab and newline: escape sequences begin with them
    "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"  # what reorders or breaks lines
    "\ud800-\udfff]"  # halves of characters, which no encoding has
)
PROGRESS = re.compile(r"\r?(\x1b\[A)*$|\r?")  # how a progress bar goes back to its line, at the start of a write


def printable(text: str) -> str:
    r"""``text`` with what would steer a terminal as escapes: ``\x1b``."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Shown:
    """A text stream that writes what is `printable` and otherwise is the stream it was made of."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        moves = PROGRESS.match(text)[0]
        return self._stream.write(moves + printable(text[len(moves) :]))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OneLine(logging.Formatter):
    """A record's message as one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join(super().formatMessage(record).split())


@contextlib.contextmanager
def safe() -> Iterator[None]:
    """Inside, standard output and error show what is `printable`; what their encoding lacks comes as escapes."""
    before = sys.stdout, sys.stderr
    for stream in filter(None, before):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and Shown(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
