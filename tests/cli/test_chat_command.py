"""What `mitrain chat` reads from a line; that its answers are predict's is in tests/e2e/test_run.py."""

import io

import pytest

from mitrain.cli import chat
from mitrain.core.errors import UserError

TAKES = {"image": "image", "speech": "audio", "left": "video", "right": "video"}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (":image a b.png", "image"),
        (":sound a b.png", "speech"),
        (":speech  a b.png", "speech"),
        (":left a b.png", "left"),
    ],
)
def test_a_kind_of_file_stands_for_the_only_input_of_that_kind(tmp_path, monkeypatch, line, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.png").touch()
    assert chat.given(line, TAKES) == (name, "a b.png")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (":imge a.png", ":imge means nothing here (did you mean 'image'?)"),
        (":video a.mp4", ":video means nothing here"),
        (":image", ":image has no file: write :image FILE"),
        (":image nowhere.png", "there is no file 'nowhere.png'"),
    ],
)
def test_what_is_no_input_is_told(tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        chat.given(line, TAKES)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("end", ["", ":quit\nnever\n", ":q\n"])
def test_lines_end_with_quit_or_the_end(monkeypatch, end):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"one\n\n  two \n{end}"))
    assert list(chat.lines()) == ["one", "two"]


def test_without_a_standard_input_nothing_is_asked(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert list(chat.lines()) == []
