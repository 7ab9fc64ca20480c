"""What a plan says of memory, beside what the system counts of a process."""

import os
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
