"""A disk that is full, at any moment of a write: one line, nothing half written, and what was there stays."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from mitrain.core.errors import CheckpointError
from mitrain.core.files import file_lock
from mitrain.core.ownership import owned
from mitrain.methods import export_format
from mitrain.methods.mit.mit import MiTConfig
from mitrain.training import checkpoint

NUMBERS = 4096
KB = 1024


def save(run: Path, step: int) -> Path:
    tensors = {"adapter": {"w": torch.full((NUMBERS,), float(step))}, "optimizer": {"m": torch.zeros(2 * NUMBERS)}}
    return checkpoint.save(run, step, tensors, {"cursor": step, "text": "x" * 3000}, keep=1)


def publish(folder: Path) -> Path:
    base = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=20)
    counts = export_format.Parameters(trainable=1, frozen=2)
    fields = export_format.method_fields("mit", MiTConfig(modalities={"image": 4}), base, "base", counts)
    return export_format.publish(folder, fields, {"adapter": {"w": torch.zeros(NUMBERS)}}, export_format.model_card, {})


def refused(write: Callable[[], object], says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        write()
    assert "\n" not in str(caught.value) and "make room" in str(caught.value)


@contextlib.contextmanager
def longest_file(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the write that would fails (Python ignores the signal)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 2900, 4 * NUMBERS, 4 * NUMBERS + 500, 8 * NUMBERS])
def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, size):
    first = save(tmp_path, 1)
    with longest_file(size):
        refused(lambda: save(tmp_path, 2), "cannot write the checkpoint of step 2")
    assert sorted(p.name for p in first.parent.iterdir()) == ["step-00000001"]
    assert checkpoint.load(checkpoint.latest(tmp_path)).state["cursor"] == 1
    save(tmp_path, 2)
    assert checkpoint.load(checkpoint.latest(tmp_path)).state["cursor"] == 2


@pytest.mark.parametrize("size", [0, 100, 1000, 4 * NUMBERS])
def test_a_write_that_fails_leaves_no_export(tmp_path, size):
    with longest_file(size):
        refused(lambda: publish(tmp_path / "adapter"), "cannot write .*adapter")
    assert list(tmp_path.iterdir()) == []
    assert export_format.read(publish(tmp_path / "adapter"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB of its own."""
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "small", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this root may not mount: {mounted.stderr.strip()[:80]}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes free, in blocks."""
    (disk / "ballast").unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    with open(disk / "ballast", "wb") as file:
        file.write(b"x" * max(0, free - leave))


def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on_once_there_is_space(small_disk):
    save(small_disk, 1)
    for leave in (0, 4, 8, 16, 24, 40, 52):
        fill(small_disk, leave * KB)
        refused(lambda: save(small_disk, 2), "No space left on device")
        assert {p.name for p in (small_disk / "checkpoints").iterdir()} == {"step-00000001"}
        assert checkpoint.load(checkpoint.latest(small_disk)).state["cursor"] == 1
    (small_disk / "ballast").unlink()
    save(small_disk, 2)
    assert checkpoint.load(checkpoint.latest(small_disk)).state["cursor"] == 2


def test_a_full_disk_leaves_no_export(small_disk):
    for leave in (0, 4, 8, 16, 20):
        fill(small_disk, leave * KB)
        refused(lambda: publish(small_disk / "adapter"), "No space left on device")
        assert [p.name for p in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    assert export_format.read(publish(small_disk / "adapter"))


@pytest.mark.parametrize("held", [owned, lambda folder: file_lock(folder / "lock")])
def test_a_lock_that_cannot_be_written_says_where(tmp_path, held):
    with longest_file(0), pytest.raises(OSError, match="File too large") as caught, held(tmp_path):
        pass
    assert Path(caught.value.filename).parent == tmp_path and not list(tmp_path.iterdir())
    with held(tmp_path):
        assert list(tmp_path.iterdir())
