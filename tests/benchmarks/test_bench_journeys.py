"""The journeys go by pages that there are, and one that fails or cannot be made is a row that says why."""

from contextlib import contextmanager

import pytest
from source_tree import ROOT

from benchmarks import journeys


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """What comes of journeys without models."""

    @contextmanager
    def no_models():
        yield tmp_path

    monkeypatch.setattr(journeys, "prepared_models", no_models)
    monkeypatch.setattr(journeys, "JOURNEYS", {})
    return lambda only=(): journeys.measured(list(only), None, None, say=lambda text: None)


def test_there_are_ten_and_their_pages_are_there():
    assert len(journeys.JOURNEYS) == 10
    for page, _ in journeys.JOURNEYS.values():
        assert (ROOT / page).is_file(), page
    one = journeys.Traveller(ROOT, {})
    assert [len(one.blocks(f"docs/tutorials/{page}.md")) for page in ("own-pictures", "own-questions")] == [6, 4]


def test_the_first_success_a_failure_and_a_lack_are_rows(rows):
    @journeys.journey("that works", "README.md")
    def works(one):
        return one.sh("echo a | cat")

    @journeys.journey("that fails", "README.md")
    def fails(one):
        one.sh("echo so far so good\necho 'mitrain: no such thing' >&2; false")

    @journeys.journey("that lacks something", "README.md")
    def lacks(one):
        raise journeys.Skipped("no browser")

    found = rows()
    assert [(row["outcome"], row["first success"].strip()) for row in found] == [
        ("works", "a"),
        ("fails", "echo so far so good: mitrain: no such thing"),
        ("skipped", "no browser"),
    ]
    assert all(row["seconds"] < 60 for row in found) and [row["journey"] for row in rows(["lacks"])] == [
        "that lacks something"
    ]
    shown = journeys.page(found, "mitrain bench journeys")
    assert "| that fails | [README.md](../../README.md) | fails | – | echo so far so good: mitrain: no such thing |" in shown
    again = journeys.page([{**found[0], "first success": "b"}], "mitrain bench journeys --only works", shown)
    titles = [line.split(" | ")[0] for line in again.splitlines() if line.startswith("| that ")]
    assert titles == ["| that works", "| that fails", "| that lacks something"]
    assert " | b | " in again and "no such thing" in again and " | a | " not in again
