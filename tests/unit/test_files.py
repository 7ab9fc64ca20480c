"""Files are whole or absent."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mitrain import files

ROOT = Path(__file__).resolve().parents[2]


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    files.write_atomic(target, "old")
    files.write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    files.write_atomic(target, "old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(target, "new")
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_atomic_folder_publishes_replaces_and_cleans_up(tmp_path):
    target = tmp_path / "data"
    for content in ("one", "two"):
        with files.atomic_folder(target) as work:
            (work / "f").write_text(content)
            assert content == "one" or (target / "f").read_text() == "one"
    assert (target / "f").read_text() == "two"
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(target) as work:
        (work / "f").write_text("three")
        raise KeyboardInterrupt
    assert (target / "f").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["data"]


def test_cache_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MITRAIN_CACHE", raising=False)
    assert files.cache_home() == tmp_path / "mitrain"
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "other"))
    assert files.cache_home() == tmp_path / "other"


def test_file_lock_makes_a_second_process_wait(tmp_path):
    code = (
        "import sys, time; from mitrain.files import file_lock\n"
        f"with file_lock({str(tmp_path / 'l')!r}): print('held', flush=True); time.sleep(float(sys.argv[1]))"
    )
    first = subprocess.Popen([sys.executable, "-c", code, "30"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    second = subprocess.Popen([sys.executable, "-c", code, "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    time.sleep(1.0)
    assert second.poll() is None
    first.kill()
    assert second.communicate(timeout=30)[0] == "held\n"
    first.communicate()
