"""Checkpoints: exact round trips, the newest complete one, rotation, and refusal of everything damaged or forged."""

import errno
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mitrain import checkpoint, files
from mitrain.errors import CheckpointError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def tensors(step: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = {"gate": torch.randn(3, generator=generator), "k.weight": torch.randn(4, 2, generator=generator)}
    return {"adapter": weights, "optimizer": {"exp_avg.gate": torch.randn(3, generator=generator)}}


def save(run: Path, step: int, **options) -> Path:
    return checkpoint.save(run, step, tensors(step), {"cursor": step}, **options)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (run / "checkpoints").glob("step-*"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path, **changes) -> None:
    file = path / "manifest.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path):
    saved = {str(dtype)[6:]: torch.arange(-3, 3).reshape(2, 3).to(dtype) for dtype in DTYPES}
    saved |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "bad": torch.tensor([torch.nan, -torch.inf])}
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
        assert torch.equal(torch.nan_to_num(back), torch.nan_to_num(tensor)), name


def test_the_folder_holds_what_the_format_says_and_nothing_else(tmp_path):
    path = save(tmp_path, 12)
    names = {"adapter.safetensors", "optimizer.safetensors", "state.json"}
    assert {file.name for file in path.iterdir()} == names | {"manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["best"]) == (1, 12, False)
    for name in names:
        content = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    payload = sum(t.numel() * t.element_size() for group in tensors().values() for t in group.values())
    assert sum((path / name).stat().st_size for name in names) < payload + 1024


def test_version_1_is_read_from_bytes_that_this_version_did_not_write(tmp_path):
    """A golden checkpoint, written out by hand from the format's description."""
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    adapter = len(header).to_bytes(8, "little") + header + np.array([1.5, -2.0], "<f4").tobytes()
    contents = {"adapter.safetensors": adapter, "state.json": b'{"step": 3}'}
    listed = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in contents.items()}
    manifest = {"format": 1, "mitrain": "0.1.0", "step": 3, "sequence": 1, "best": True, "files": listed}
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    for name, content in {**contents, "manifest.json": json.dumps(manifest).encode()}.items():
        (folder / name).write_bytes(content)
    loaded = checkpoint.load(checkpoint.latest(tmp_path))
    assert loaded.tensors["adapter"]["w"].tolist() == [1.5, -2.0]
    assert (loaded.step, loaded.best, loaded.state) == (3, True, {"step": 3})


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
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("fails_at", ["adapter.safetensors", "state.json", "manifest.json", "os.replace"])
def test_a_full_disk_is_one_line_and_leaves_everything_as_it_was(tmp_path, monkeypatch, fails_at):
    first = save(tmp_path, 1)
    real = Path.write_bytes

    def full(self, content):
        if self.name == fails_at:
            real(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, content)

    def full_replace(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    if fails_at == "os.replace":
        monkeypatch.setattr(files.os, "replace", full_replace)
    with pytest.raises(CheckpointError, match="step 2.*No space left on device.*make room"):
        save(tmp_path, 2)
    assert sorted(p.name for p in first.parent.iterdir()) == [".lock", "step-00000001"]
    assert checkpoint.load(checkpoint.latest(tmp_path)).state == {"cursor": 1}


def test_what_does_not_read_back_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: Path.open(self, "wb").close())
    with pytest.raises(CheckpointError, match="does not read back as written, check the disk"):
        save(tmp_path, 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [".lock"]


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


def entry(**changes) -> dict:
    return {"sha256": "0" * 64, "bytes": 3} | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2, "files": "moved"}, "format 2.*upgrade mitrain"),
        ({"format": 0}, "no checkpoint manifest"),
        ({"format": True}, "no checkpoint manifest"),
        ({"format": None}, "no checkpoint manifest"),
        ({"step": -1}, "no checkpoint manifest"),
        ({"step": 1.5}, "no checkpoint manifest"),
        ({"sequence": "1"}, "no checkpoint manifest"),
        ({"best": 1}, "no checkpoint manifest"),
        ({"files": [1]}, "no checkpoint manifest"),
        ({"files": {}}, "lists no state.json"),
        ({"files": {"state.json": entry(), "../../secret.safetensors": entry()}}, "which no checkpoint has"),
        ({"files": {"state.json": entry(), "/etc/passwd": entry()}}, "which no checkpoint has"),
        ({"files": {"state.json": entry(), "weights.pt": entry()}}, "which no checkpoint has"),
        ({"files": {"state.json": entry(), "a.safetensors\n": entry()}}, "which no checkpoint has"),
        ({"files": {"state.json": entry(bytes="3")}}, "no checksum and size"),
        ({"files": {"state.json": entry(bytes=-3)}}, "no checksum and size"),
        ({"files": {"state.json": entry(sha256=None)}}, "no checksum and size"),
        ({"files": {"state.json": "x"}}, "no checksum and size"),
        ({"files": {"state.json": entry()}}, "state.json is (longer|torn)"),
    ],
)
def test_a_forged_manifest_is_refused_in_one_line(tmp_path, changes, says):
    path = save(tmp_path, 1)
    edit_manifest(path, **changes)
    for read in (checkpoint.load, checkpoint.verify):
        with pytest.raises(CheckpointError, match=says) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "adapter.safetensors"])
def test_files_that_are_missing_torn_links_or_folders_are_refused(tmp_path, name):
    for number, damage in enumerate((missing, torn, grown, linked, dangling, folder, pipe)):
        path = save(tmp_path / str(number), 1)
        damage(path / name)
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(path)
        assert checkpoint.latest(tmp_path / str(number)) is None


def missing(path: Path) -> None:
    path.unlink()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x" * (checkpoint.MANIFEST_LIMIT + 1))


def linked(path: Path) -> None:
    path.rename(path.with_name("original"))
    path.symlink_to("original")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """Opening it for reading would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def test_a_checkpoint_folder_that_is_a_link_is_not_taken_for_one(tmp_path, caplog):
    real = save(tmp_path, 1)
    other = save(tmp_path / "other", 2)
    (real.parent / "step-00000002").symlink_to(other)
    assert checkpoint.latest(tmp_path) == real
    assert "is a link" in caplog.text


def test_a_path_without_a_checkpoint_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            checkpoint.load(path)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 5)


def signed(path: Path, name: str, content: bytes) -> None:
    """Put ``content`` in place with a manifest that vouches for it: what a forger would do."""
    (path / name).write_bytes(content)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    listed[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(path, files=listed)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_bytes_end_in_a_checkpoint_error_or_the_same_content(pristine, tmp_path, data):
    path = tmp_path / "copy"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(pristine, path)
    name = data.draw(st.sampled_from(sorted(file.name for file in path.iterdir())))
    content = bytearray((path / name).read_bytes())
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    if name == "manifest.json" or data.draw(st.booleans()):
        (path / name).write_bytes(content)
        forged = False
    else:
        signed(path, name, bytes(content))
        forged = True
    try:
        loaded = checkpoint.load(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        original = checkpoint.load(pristine)
        same = loaded.state == original.state and loaded.tensors.keys() == original.tensors.keys()
        assert forged or name == "manifest.json" or same


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    key=st.sampled_from([None, "format", "step", "sequence", "best", "files"]),
)
def test_a_manifest_of_any_json_is_refused_or_read(pristine, tmp_path, value, key):
    path = tmp_path / "copy"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(pristine, path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(value if key is None else manifest | {key: value}))
    try:
        checkpoint.load(path)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' + b"1" * 5000 + b"}", b"\xff\xfe", b"[]", b"", b"null"])
def test_hostile_json_is_one_line(tmp_path, content):
    path = save(tmp_path, 1)
    signed(path, "state.json", content)
    with pytest.raises(CheckpointError, match="state.json"):
        checkpoint.load(path)


def test_a_pickle_in_disguise_is_refused(tmp_path):
    path = save(tmp_path, 1)
    torch.save({"w": torch.ones(1)}, tmp_path / "pickle")
    signed(path, "adapter.safetensors", (tmp_path / "pickle").read_bytes())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(path)


def test_only_trainable_takes_parameters_and_buffers_and_refuses_frozen_weights():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    named = checkpoint.only_trainable(module)
    assert named.keys() == module.state_dict().keys() and "1.running_mean" in named and "scratch" not in named
    assert not any(tensor.requires_grad for tensor in named.values())
    module[0].weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match="'0.weight' is frozen"):
        checkpoint.only_trainable(module)


def test_restore_lists_what_does_not_fit_and_then_changes_nothing(tmp_path):
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    checkpoint.restore(module, checkpoint.only_trainable(other), "adapter")
    assert torch.equal(module.weight, other.weight)
    wrong = {"weight": torch.zeros(4, 2), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="bias is missing; extra is unknown; weight has shape .4, 2., here .3, 2"):
        checkpoint.restore(module, wrong, "adapter")
    assert torch.equal(module.weight, other.weight)


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_random_states_come_back_through_json():
    random.gauss(0, 1), np.random.randn()  # both keep a second number in store
    state = json.loads(json.dumps(checkpoint.rng_state()))
    first = draw()
    assert draw() != first
    checkpoint.set_rng_state(state)
    assert draw() == first


@pytest.mark.parametrize(
    "break_it",
    [
        lambda s: s.pop("torch"),
        lambda s: s.update(torch="AAAA"),
        lambda s: s.update(torch="not base64!"),
        lambda s: s.update(numpy=3),
        lambda s: s["numpy"].update(bit_generator="PCG64"),
        lambda s: s["python"].update(words="AAAA"),
        lambda s: s["python"].update(version=9),
    ],
)
def test_a_broken_random_state_is_one_line(break_it):
    state = checkpoint.rng_state()
    broken = json.loads(json.dumps(state))
    break_it(broken)
    with pytest.raises(CheckpointError, match="random state"):
        checkpoint.set_rng_state(broken)
    checkpoint.set_rng_state(state)


TRAIN = '''
import random, sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
from mitrain import checkpoint
from mitrain.engine import Group, LocalEngine, OptimizerConfig

def train(run, first, last):
    """Train steps [first, last) of a net with dropout and batch norm on data from all three random generators."""
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
    group = Group("net", dict(net.named_parameters()), 0.01, 0.1)
    engine = LocalEngine([group], lambda step: 0.9**step, OptimizerConfig())
    if first:
        loaded = checkpoint.load(checkpoint.latest(run))
        assert loaded.step == first
        checkpoint.restore(net, loaded.tensors["adapter"], "adapter")
        engine.load_state_dict(loaded.tensors["optimizer"], loaded.state["engine"])
        checkpoint.set_rng_state(loaded.state["rng"])
    for step in range(first, last):
        for _ in range(2):
            count = random.randint(2, 6)
            x = torch.from_numpy(np.random.randn(count, 4)).float() + torch.randn(count, 4)
            engine.backward((net(x) - x.sum(1, keepdim=True)).square().sum(), count)
        assert engine.step().applied
    moments, state = engine.state_dict()
    groups = {"adapter": checkpoint.only_trainable(net), "optimizer": moments}
    checkpoint.save(run, last, groups, {"engine": state, "rng": checkpoint.rng_state()})

torch.set_num_threads(1)
for run, first, last in zip(*[iter(sys.argv[1:])] * 3):
    train(Path(run), int(first), int(last))
'''


def test_a_run_resumed_in_a_new_process_equals_the_straight_one_bit_for_bit(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for arguments in ("straight 0 10 resumed 0 5", "resumed 5 10"):
        command = [sys.executable, "-c", TRAIN, *arguments.split()]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    straight, resumed = (checkpoint.load(checkpoint.latest(tmp_path / run)) for run in ("straight", "resumed"))
    assert straight.step == resumed.step == 10 and straight.state == resumed.state
    assert straight.tensors.keys() == resumed.tensors.keys()
    for group, named in straight.tensors.items():
        assert named.keys() == resumed.tensors[group].keys() and len(named) > 5
        assert all(torch.equal(tensor, resumed.tensors[group][name]) for name, tensor in named.items())
