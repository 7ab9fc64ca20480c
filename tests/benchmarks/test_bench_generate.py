"""Tokens per second beside the plain model: the same work, in turns, and what is refused."""

import json

import pytest
import torch

from benchmarks import generate, ranks
from benchmarks.command import main
from benchmarks.faults import world
from mitrain.models import loading


@pytest.fixture
def llm(tmp_path, monkeypatch):
    """A model of 3 layers, measured in this process by a clock that counts calls."""
    with loading.quiet():
        world.language_model(tmp_path / "llm")
    monkeypatch.setattr(
        ranks, "found", lambda work, given, *_: (work(*given, out := tmp_path / "o"), json.loads(out.read_text()))[1]
    )
    return str(tmp_path / "llm")


def test_both_do_the_same_work_in_turns(llm, monkeypatch, capsys, tmp_path):
    said, timed = [], []
    before, measure = generate.generated, generate.timed

    def noting(parts, ids, mask, **options):
        made = before(parts, ids, mask, **options)
        said.append((parts.adapter is not None, tuple(made.shape)))
        return made

    monkeypatch.setattr(generate, "generated", noting)
    monkeypatch.setattr(generate, "timed", lambda call: (timed.append(1), measure(call) + 1e-6)[1])
    words = ["--llm", llm, "--batch", "3", "--prompt", "5", "--tokens", "4", "--rounds", "2", "--out", str(tmp_path / "r")]
    assert main(["generate", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["work"] for row in found["rows"]] == list(generate.WORK) and len(timed) == 2 * 3 * 3
    assert {shape for _, shape in said} == {(3, 9)}
    assert [own for own, _ in said] == [True, False, False, True, True, False]
    for row in found["rows"]:
        assert 0 < row["least"] <= row["ratio"] <= row["most"] and row["tokens_s"] > 0
    assert "| generation |" in (tmp_path / "r" / "table.md").read_text()


def test_a_ratio_is_that_of_one_round():
    row = generate.row_of("generation", [(1.0, 2.0), (4.0, 4.0), (10.0, 5.0)], 100)
    assert (row["ratio"], row["least"], row["most"]) == (1.0, 0.5, 2.0)
    assert (row["plain_tokens_s"], row["tokens_s"]) == (25.0, 25.0)


def test_evaluation_asks_for_the_tokens_behind_the_prompt(llm):
    text = generate.TextBackbone.load(llm, torch.float32)
    asked = []
    text.log_likelihood = lambda *given: asked.append(given)
    ids = torch.arange(3, 3 + 14).view(2, 7) % text.vocabulary
    generate.score(text, ids, 4)
    _, _, rows, positions, targets, _, _ = asked[0]
    assert rows.tolist() == [0, 0, 0, 1, 1, 1] and positions.tolist() == [3, 4, 5] * 2
    assert targets.tolist() == ids[:, 4:].flatten().tolist()


def test_nothing_to_measure_is_one_line(capsys):
    assert main(["generate", "--tokens", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
