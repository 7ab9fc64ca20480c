"""What a plan says of memory, beside what the system counts of a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mitrain.training import checkpoint
from mitrain.training.plan.plan import saving

MIB = 2**20


def most_held(work) -> int:
    """Bytes that lie in memory at most while ``work()`` runs, beyond those before."""
    status = lambda name: 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.mark.slow  # by itself: what other tests of a process left to the allocator counts, too
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux counts a peak anew")
def test_writing_a_checkpoint_holds_three_copies_of_a_file_and_the_file_before(tmp_path):
    """64 MiB and then 96: tensors large enough that the allocator maps each by itself."""
    sizes = {"adapter": 64, "optimizer": 96}
    tensors = {name: {"x": torch.ones(size * MIB // 4)} for name, size in sizes.items()}
    assert saving([size * MIB for size in sizes.values()]) == (64 + 3 * 96) * MIB
    held = most_held(lambda: checkpoint.save(tmp_path, 1, tensors, {}))
    assert held == pytest.approx(saving([size * MIB for size in sizes.values()]), rel=0.05)


SHORT = ("train.steps=2", "train.schedule.warmup=1", "train.eval_every=2", "train.save_every=2", "train.eval_samples=32")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere malloc keeps other blocks")
@pytest.mark.parametrize("words", ["retrieve-tuxpaint adapter.layers=22-29 adapter.rank=32 train.batch=40"])
def test_a_plan_is_within_a_tenth_of_what_a_run_holds(words, tmp_path):
    """Of a heap whose holes take no tensor of the same size again, the run held 1.4 times what was planned."""
    command = [sys.executable, "-m", "mitrain"]
    told = subprocess.run([*command, "plan", *words.split(), *SHORT, "--json"], capture_output=True, check=True)
    planned = json.loads(told.stdout)
    if any("not at hand" in line for line in planned["assumptions"]):
        pytest.skip("its data or tokenizer is not on this machine: mitrain data prepare")
    run = subprocess.Popen([*command, "train", "-q", *words.split(), *SHORT, "--runs", str(tmp_path)])
    _, status, used = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)  # Popen itself has not waited
    assert run.returncode == 0
    assert planned["total_bytes"] == pytest.approx(1024 * used.ru_maxrss, rel=0.1)
