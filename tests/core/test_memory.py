"""What control groups leave to a process, and that where nothing is left a line is said before the kernel's signal."""

import sys
import threading
import time

import pytest

from mitrain.core import memory

MIB = 1 << 20


@pytest.fixture(params=["0::/job/step", "4:cpuset:/\n2:memory:/job/step"], ids=["v2", "v1"])
def job(request, monkeypatch, tmp_path):
    """(The folder of the parent of this process's group, the names of its files, a field of its cache)."""
    first = request.param.startswith("0")
    root = tmp_path if first else tmp_path / "memory"
    (root / "job" / "step").mkdir(parents=True)
    (tmp_path / "self").write_text(request.param + "\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OF_THIS", tmp_path / "self")
    names = ("memory.max", "memory.current") if first else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    return root / "job", *names, "active_file" if first else "total_active_file"


def limited(job, most, used, cache):
    folder, limit, usage, field = job
    (folder / limit).write_text(f"{most}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"{field} {cache}\nother 7\n")


def test_the_limit_of_a_group_above_holds_too(job):
    whole = memory.there()
    limited(job, 4096 * MIB // 1024, MIB, 0)
    assert memory.there() == 4 * MIB < whole
    limited(job, "max" if job[1] == "memory.max" else (1 << 63) - 4096, MIB, 0)
    assert memory.there() == whole


def test_where_nothing_is_left_the_process_ends_in_a_line(job, monkeypatch, capfd):
    """40 MiB are left, 32 of them pages of files; then 8."""
    codes, reasons = [], []
    monkeypatch.setattr(memory.os, "_exit", codes.append)
    limited(job, 100 * MIB, 92 * MIB, 32 * MIB)
    with memory.watched(reasons.append):
        time.sleep(20 * memory.SHORTEST_S)
        assert not codes
        limited(job, 100 * MIB, 92 * MIB, 0)
        waits = iter(range(1000))
        while not codes and next(waits, None) is not None:
            time.sleep(memory.SHORTEST_S)
    told = capfd.readouterr().err
    assert reasons == [told.removeprefix("mitrain: ").split(": lower")[0]]
    assert codes == [2] and told.startswith("mitrain: out of memory (of the 105 MB") and told.count("\n") == 1


def test_a_reason_that_cannot_be_written_does_not_keep_the_process(job, monkeypatch):
    codes = []
    monkeypatch.setattr(memory.os, "_exit", codes.append)
    limited(job, 100 * MIB, 92 * MIB, 0)
    with memory.watched(lambda why: (_ for _ in ()).throw(OSError("the disk is full"))):
        waits = iter(range(1000))
        while not codes and next(waits, None) is not None:
            time.sleep(memory.SHORTEST_S)
    assert codes[:1] == [2]


def test_without_a_limit_nothing_is_watched(job):
    for without in ("max" if job[1] == "memory.max" else (1 << 63) - 4096, sys.maxsize - 4095):
        limited(job, without, MIB, 0)
        with memory.watched(lambda why: None):
            assert memory.WATCH not in [thread.name for thread in threading.enumerate()]
