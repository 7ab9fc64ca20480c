"""The words that a Whisper hears: which clips are asked for, what is counted as wrong, the verdict."""

import json

import pytest

from benchmarks import transcribe
from benchmarks.command import main


def test_a_word_error_is_a_word_in_place_of_another_too_many_or_left_out():
    cases = {("a b c", "a b c"): 0, ("a x c", "a b c"): 1, ("a c", "a b c"): 1, ("a b b c", "a b c"): 1, ("", "a b"): 2}
    assert {pair: transcribe.wrong(*pair) for pair in cases} == cases
    assert transcribe.plain("'Well-known,' it's  MR. O'Neil!") == "well known it's mr o'neil"


def test_lines_spread_over_the_split_are_heard_and_written(monkeypatch, capsys, tmp_path):
    rows = [
        {
            "id": str(i),
            "speech": f"{i}.mp3",
            "text": f"This is the line {i}." if i % 2 else ("Ha ha ha ha ha!", "Too short.")[i % 4 // 2],
        }
        for i in range(8)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(transcribe, "ensure_data", lambda name: tmp_path)
    monkeypatch.setattr(transcribe, "ensure_model", lambda name: tmp_path)
    monkeypatch.setattr(transcribe.loading, "load", lambda factory, path, *_, **__: factory)
    monkeypatch.setattr(transcribe.WhisperForConditionalGeneration, "eval", lambda: None)
    monkeypatch.setattr(transcribe, "transcribed", lambda model, processor, folder, file: f"This is a line, {file[0]}?")
    words = ["transcribe", "--json", "--out", str(tmp_path / "out"), "--clips"]
    assert main([*words, "2"]) == 1  # one word of five is above the limit
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(one["id"], one["heard"], one["words"], one["wrong"]) for one in found["clips"]] == [
        ("1", "this is a line 1", 5, 1),
        ("5", "this is a line 5", 5, 1),
    ]
    assert "| 2 | 10 | 2 | 0.200 | above 0.15 |" in (tmp_path / "out" / "table.md").read_text()
    assert "word error rate is 0.200, 0.15 are allowed" in capsys.readouterr().err
    transcribe.check({"clips": [{"words": 20, "wrong": 3}]})
    assert main([*words, "5"]) == 2
    assert "has 4 lines of 4 different words or more in its test split" in capsys.readouterr().err


@pytest.mark.parametrize("clips", ["0", "-3"])
def test_no_clips_are_one_line(clips, capsys):
    assert main(["transcribe", "--clips", clips]) == 2
    assert capsys.readouterr().err.count("\n") == 1
