"""`mitrain cache`: what is counted, what goes, and that nothing goes that may be in use."""

import os
import time

import pytest
from commands import as_json

from mitrain.cli import main
from mitrain.core import cached, prepared

DAY = 86_400


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path))
    recipe = prepared.Recipe("shapes", "", "", "", 0, "", version=2)
    monkeypatch.setattr(prepared, "recipes", lambda what: {"shapes": recipe})
    return tmp_path


def entry(path, days_ago, size=1000):
    file = path / "file"
    path.mkdir(parents=True)
    file.write_bytes(b"x" * size)
    for one in (file, path):
        os.utime(one, (time.time() - days_ago * DAY,) * 2)
    return path


def asked(capsys, *words):
    return as_json(capsys, "cache", *words)


def test_kinds_are_counted(home, capsys):
    entry(home / "data/mine", 3)
    entry(home / "features/images/a", 3)
    entry(home / "features/images/b", 1)
    found = {row["kind"]: row for row in asked(capsys)["kinds"]}
    assert {kind: row["entries"] for kind, row in found.items()} == {"data": 1, "features": 2}
    assert found["features"]["last_read"] == time.strftime("%Y-%m-%d", time.localtime(time.time() - DAY))
    assert 2000 <= found["features"]["bytes"] < 20_000
    assert [row["kind"] for row in asked(capsys, "data")["kinds"]] == ["data"]


def test_what_nothing_refers_to_goes_and_what_is_prepared_stays(home, capsys):
    kept = [entry(home / "data/shapes-2-seed0", 9), entry(home / "data/hf-x", 9), entry(home / "features/images/a", 9)]
    gone = [
        entry(home / "data/shapes-1-seed3", 9),
        entry(home / "models/.shapes.k1", 9),
        entry(home / "models/shapes", 9),
    ]
    found = asked(capsys, "--prune")
    assert sorted(found["removed"]) == sorted(map(str, gone)) and found["freed"] >= 3000
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
    assert not list(home.rglob(".*"))


def test_what_was_not_read_for_long_goes_when_asked_for(home, capsys):
    old, new = entry(home / "features/images/a", 40), entry(home / "features/images/b", 20)
    other = entry(home / "archives/c", 40)
    assert asked(capsys, "features", "--prune", "--older", "30")["removed"] == [str(old)]
    assert new.exists() and other.exists()


def test_nothing_goes_that_may_be_in_use(home, capsys):
    recent, leftover = entry(home / "features/images/a", 0.5), entry(home / "models/.shapes.k1", 0)
    held = entry(home / "features/images/b", 40)
    with open(held / "file", "rb"):
        os.utime(held / "file", (time.time() - 40 * DAY,) * 2)
        used = set(cached.opened())
        found = asked(capsys, "--prune", "--older", "0")
    assert held / "file" in used and found["removed"] == []
    assert recent.exists() and leftover.exists()
    assert asked(capsys, "--prune", "--older", "0")["removed"] == [str(held)]


def test_what_makes_no_sense_is_refused(home, capsys):
    entry(home / "features/images/a", 1)
    assert main(["cache", "featurs"]) == 2
    assert "no 'featurs'" in (said := capsys.readouterr().err) and "(did you mean 'features'?)" in said
    assert main(["cache", "--older", "3"]) == 2
    assert "--older goes with --prune" in capsys.readouterr().err
