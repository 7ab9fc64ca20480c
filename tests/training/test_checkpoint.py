"""Checkpoints: exact round trips, the newest complete one, rotation, and what a failing disk leaves."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import flip_a_bit, save, steps, tensors
from tiny import tiny

import mitrain
from mitrain.core.errors import CheckpointError
from mitrain.training import checkpoint

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path):
    saved = {str(dtype)[6:]: torch.arange(-3, 3).reshape(2, 3).to(dtype) for dtype in DTYPES}
    saved |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "huge": torch.tensor([1e300, -5e-324], dtype=torch.float64),
    }
    whole = torch.randn(6, 6)
    saved |= {"transposed": whole.T, "part": whole[::2, 1:3], "leaf": whole.clone().requires_grad_()}
    state = {"cursor": 7, "nested": {"list": [1, 2.5, None, "ü"]}, "exact": 0.1 + 0.2}
    path = checkpoint.save(tmp_path, 7, {"adapter": saved, "nothing": {}}, state, best=True)
    loaded = checkpoint.load(path)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert (loaded.path, loaded.step, loaded.best, loaded.state) == (path, 7, True, state)
    assert loaded.tensors["nothing"] == {} and loaded.tensors["adapter"].keys() == saved.keys()
    for name, tensor in saved.items():
        back = loaded.tensors["adapter"][name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back, tensor), name


def test_the_folder_holds_what_the_format_says_and_nothing_else(tmp_path):
    path = save(tmp_path, 12)
    names = {"adapter.safetensors", "optimizer.safetensors", "state.json"}
    assert {file.name for file in path.iterdir()} == names | {"manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["best"]) == (3, 12, False)
    for name in names:
        content = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    payload = sum(t.numel() * t.element_size() for group in tensors().values() for t in group.values())
    assert sum((path / name).stat().st_size for name in names) < payload + 1024


def test_it_holds_what_is_trained_and_little_more(tmp_path):
    """At most 1.1 times the bytes of the trained tensors, their moments and the random states, for an adapter of MiT."""
    model = tiny("llama")
    mit = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": 64}, layers="all"))
    weights = checkpoint.only_trainable(mit)
    moments = {f"{slot}.{name}": torch.zeros_like(t) for name, t in weights.items() for slot in ("exp_avg", "exp_avg_sq")}
    state = {"rng": [checkpoint.rng_state()]}
    path = checkpoint.save(tmp_path, 1, {"adapter": weights, "optimizer": moments}, state)
    numbers = sum(p.numel() for p in mit.parameters())
    theory = 3 * 4 * numbers + len(json.dumps(state))
    assert theory < sum(file.stat().st_size for file in path.iterdir()) <= 1.1 * theory
    assert numbers < sum(p.numel() for p in model.parameters()) and len(weights) == len(list(mit.parameters()))


def test_the_newest_complete_one_wins_and_damaged_ones_are_named_and_kept(tmp_path, caplog):
    assert checkpoint.latest(tmp_path) is None
    paths = [save(tmp_path, step, keep=9) for step in (10, 20, 30, 40)]
    assert checkpoint.latest(tmp_path) == paths[3]
    (paths[3] / "manifest.json").unlink()
    flip_a_bit(paths[2] / "adapter.safetensors")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == paths[1]
    assert "step-00000040" in caplog.text and "step-00000030" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert steps(tmp_path) == [10, 20, 30, 40]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=2, best=step in (1, 3))
    assert steps(tmp_path) == [3, 6, 7]
    assert checkpoint.load(checkpoint.best(tmp_path)).step == 3
    save(tmp_path, 8, keep=2, best=True)
    assert steps(tmp_path) == [7, 8]
    save(tmp_path, 9, keep=0)
    assert steps(tmp_path) == [8, 9]


def test_rotation_never_counts_or_removes_a_damaged_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").unlink()
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").write_text("{")
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_rotation_names_a_corrupted_one_and_leaves_it(tmp_path, caplog):
    """Of the right size, so only its checksum tells; and the good ones around it are counted as ever."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    flip_a_bit(tmp_path / "checkpoints" / "step-00000002" / "adapter.safetensors")
    save(tmp_path, 4, keep=1)
    assert steps(tmp_path) == [2, 4] and "step-00000002" in caplog.text
    flip_a_bit(tmp_path / "checkpoints" / "step-00000004" / "state.json")
    save(tmp_path, 5, keep=1)
    assert steps(tmp_path) == [2, 4, 5] and checkpoint.load(checkpoint.latest(tmp_path)).step == 5


def test_a_run_that_went_back_does_not_overwrite_and_its_own_checkpoints_count_as_newest(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    again = checkpoint.save(tmp_path, 20, tensors(99), {"cursor": "second life"}, keep=3)
    assert again.name == "step-00000020.1" and checkpoint.latest(tmp_path) == again
    assert checkpoint.load(tmp_path / "checkpoints" / "step-00000020").state == {"cursor": 20}
    save(tmp_path, 21, keep=2)
    assert checkpoint.load(checkpoint.latest(tmp_path)).step == 21
    assert {path.name for path in again.parent.glob("step-*")} == {"step-00000020.1", "step-00000021"}


def test_leftovers_of_a_killed_writer_are_named_and_removed_by_the_next(tmp_path, caplog):
    path = save(tmp_path, 1)
    shutil.copytree(path, path.with_name(".step-00000002.x7"))
    assert checkpoint.latest(tmp_path) == path
    save(tmp_path, 2)
    assert ".step-00000002.x7" in caplog.text
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-00000001", "step-00000002"]


def test_what_does_not_read_back_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: Path.open(self, "wb").close())
    with pytest.raises(CheckpointError, match="does not read back as written, check the disk"):
        save(tmp_path, 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == []


def test_an_impossible_run_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(tmp_path / "file", 1)
    assert checkpoint.latest(tmp_path / "file") is None


def test_group_names_are_file_names(tmp_path):
    for name in ("../x", "a/b", "", ".hidden", "A", "ü"):
        with pytest.raises(ValueError, match="cannot name a group"):
            checkpoint.save(tmp_path, 1, {name: {}}, {})
    assert checkpoint.latest(tmp_path) is None
