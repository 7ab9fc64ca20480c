"""Files are whole or absent."""

import errno
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mitrain.core import files
from mitrain.core.errors import RankError, UserError
from mitrain.core.waiting import within

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


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775), (0o022, 0o644, 0o755)])
def test_what_is_written_has_the_mode_that_the_umask_gives(tmp_path, mask, file, folder):
    before = os.umask(mask)
    try:
        files.write_atomic(tmp_path / "deep" / "a.txt", "a")
        with files.atomic_folder(tmp_path / "whole") as work:
            (work / "inner").mkdir()
            (work / "inner" / "b").write_text("b")
            (work / "inner" / "b").chmod(0o600)  # as safetensors leaves it
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"deep": folder, "deep/a.txt": file, "whole": folder, "whole/inner": folder, "whole/inner/b": file}


def test_a_full_disk_is_said_of_the_file_that_was_to_be(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_atomic(tmp_path / "a.txt", "a")
    assert caught.value.filename == str(tmp_path / "a.txt") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EPERM, "get the right to write there"),
        (errno.EROFS, "get the right to write there"),
        (errno.ENOLCK, "use a file system that can do this"),
        (errno.EIO, "check the path and the disk"),
    ],
)
def test_the_advice_is_the_faults_own(number, says):
    assert files.remedy(OSError(number, "x")) == says


def test_cache_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MITRAIN_CACHE", raising=False)
    assert files.cache_home() == tmp_path / "mitrain"
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "other"))
    assert files.cache_home() == tmp_path / "other"


def test_file_lock_makes_a_second_process_wait(tmp_path):
    code = (
        "import sys, time; from mitrain.core.files import file_lock\n"
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


ELSEWHERE = "71\nnode-9\n"  # a holder whose end nobody here can know


def test_a_held_lock_says_for_whom_it_waits_and_ends_in_time(tmp_path, monkeypatch, caplog):
    marker = tmp_path / "l"
    marker.write_text(ELSEWHERE)
    monkeypatch.setattr(files, "SILENT_S", 0.0)
    says = rf"process 71 on node-9 since [-0-9]+ [:0-9]+ holds {re.escape(str(marker))} .* in 0.3 s: .* remove that file"
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match=says), files.file_lock(marker, seconds=0.3):
        pass
    (said,) = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(rf"waiting for process 71 on node-9 since .*, which holds {re.escape(str(marker))}", said)
    assert marker.read_text() == ELSEWHERE


def test_a_wait_for_a_lock_hears_signals(tmp_path):
    """Also of a handler that is no end of the process by itself."""
    (tmp_path / "l").write_text(ELSEWHERE)

    def heard(*_):
        raise InterruptedError

    former = signal.signal(signal.SIGALRM, heard)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(InterruptedError), files.file_lock(tmp_path / "l", seconds=300):
            pass
    finally:
        signal.signal(signal.SIGALRM, former)


def test_a_marker_without_a_name_belongs_to_nobody(tmp_path, monkeypatch):
    """What a holder left that lost power before its name was on the disk."""
    monkeypatch.setattr(files, "EMPTY_S", 0.2)
    (tmp_path / "l").touch()
    with files.file_lock(tmp_path / "l", seconds=60):
        assert (tmp_path / "l").read_text().startswith(f"{os.getpid()}\n{socket.gethostname()}")
    assert not (tmp_path / "l").exists()


def test_the_wait_is_mitrain_timeout(tmp_path, monkeypatch):
    (tmp_path / "l").write_text(ELSEWHERE)
    monkeypatch.setenv("MITRAIN_TIMEOUT", "1")
    with pytest.raises(UserError, match="not let go in 1 s"), files.file_lock(tmp_path / "l"):
        pass
    monkeypatch.setenv("MITRAIN_TIMEOUT", "soon")
    with pytest.raises(RankError, match="MITRAIN_TIMEOUT=soon"), files.file_lock(tmp_path / "l"):
        pass


def test_a_call_is_left_behind_after_its_time():
    assert within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match=r"timed out after 0.1 s"):
        within(0.1, lambda: time.sleep(3))
