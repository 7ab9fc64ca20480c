"""What control groups leave to a process, and that taking more is an error of its own and no signal."""

import resource
import sys
import time
from pathlib import Path

import pytest
import torch

from mitrain.core import memory
from mitrain.core.errors import is_out_of_memory

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


def as_much_again():
    """Bytes of all that this process has mapped: no hole of its heap, however many tests ran in it, can hold them."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0])


def test_where_next_to_nothing_is_left_more_is_refused(job):
    """96 MiB are left, 32 of them pages of files; then 32 of them."""
    limited(job, 132 * MIB, 68 * MIB, 32 * MIB)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.bounded():
        time.sleep(5 * memory.EVERY_S)
        torch.empty(as_much_again(), dtype=torch.uint8)
        limited(job, 132 * MIB, 132 * MIB, 32 * MIB)
        waits = iter(range(1000))
        while resource.getrlimit(resource.RLIMIT_DATA) == before and next(waits, None) is not None:
            time.sleep(memory.EVERY_S)
        with pytest.raises(RuntimeError) as refused:
            torch.empty(as_much_again(), dtype=torch.uint8)
    assert is_out_of_memory(refused.value) and resource.getrlimit(resource.RLIMIT_DATA) == before


def test_where_nothing_is_left_the_process_ends_in_a_line(job, monkeypatch, capfd):
    limited(job, 100 * MIB, 99 * MIB, 0)
    codes = []
    monkeypatch.setattr(memory.os, "_exit", codes.append)
    with memory.bounded():
        waits = iter(range(1000))
        while not codes and next(waits, None) is not None:
            time.sleep(memory.EVERY_S)
    told = capfd.readouterr().err
    assert codes == [2] and told.startswith("mitrain: out of memory (of the 105 MB") and told.count("\n") == 1


def test_without_a_limit_nothing_is_bounded(job):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.bounded():
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    limited(job, sys.maxsize - 4095, MIB, 0)
    with memory.bounded():
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
