"""Text from data cannot steer the terminal, nor end a command whose terminal lacks a character."""

import io
import logging
import sys

import pytest
from tqdm import tqdm

from mitrain.cli import main
from mitrain.core import terminal
from mitrain.core.errors import UserError

HOSTILE = "a\x1b]0;title\x07\x1b[31m\x9b1m\x7f\r\u202egpj.exe\u2028b\ud800"
SHOWN = "a\\x1b]0;title\\x07\\x1b[31m\\x9b1m\\x7f\\r\\u202egpj.exe\\u2028b\\ud800"


def test_what_steers_a_terminal_is_shown_as_escapes():
    assert terminal.printable(HOSTILE) == SHOWN
    assert terminal.printable("Größe\t½ 猫 😀\n") == "Größe\t½ 猫 😀\n"
    assert str(UserError("no 'a\x1b[2J\nmitrain: done'")) == "no 'a\\x1b[2J mitrain: done'"


def test_streams_are_safe_inside_and_as_they_were_outside(capsys, monkeypatch):
    before = sys.stdout, sys.stderr
    with terminal.safe():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        sys.stdout.writelines([HOSTILE])
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == (f"{SHOWN}\n{SHOWN}", f"{SHOWN}\n")
    monkeypatch.setattr("sys.stdout", None)  # as Python has it where the caller closed it
    with terminal.safe():
        print("nowhere")


def test_progress_bars_still_go_back_to_their_line(capsys):
    with terminal.safe():
        for _ in tqdm(range(2), desc="val \x1b[2J", file=sys.stderr, mininterval=0):
            pass
        sys.stderr.write("\x1b[A\x1b[A")
    said = capsys.readouterr().err
    assert "\rval \\x1b[2J: " in said and said.endswith("\x1b[A\x1b[A") and said.count("\x1b") == 2


def test_a_logged_name_makes_no_line_of_its_own():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "skipped %s", ("a\nmitrain: done",), None)
    assert terminal.OneLine("mitrain: %(message)s").format(record) == "mitrain: skipped a mitrain: done"


def test_a_terminal_without_a_character_shows_its_escape(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", narrow)
    with terminal.safe():
        print("é чай")
    narrow.flush()
    assert narrow.buffer.getvalue().decode("latin-1").strip() == "é \\u0447\\u0430\\u0439"


@pytest.mark.parametrize("words", [["train", HOSTILE], ["train", "--x" + HOSTILE], [HOSTILE], ["eval", HOSTILE]])
def test_whatever_stands_on_the_command_line_is_shown_in_escapes(capsys, words):
    try:
        assert main(words) == 2
    except SystemExit as ended:
        assert ended.code == 2
    said = capsys.readouterr().err
    assert said.startswith("mitrain: ") and not terminal.UNSAFE.search(said)
