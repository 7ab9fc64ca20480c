"""Damaged and forged checkpoints are refused in one line, whatever was done to them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    dangling,
    edit_manifest,
    folder,
    grown,
    linked,
    missing,
    pipe,
    save,
    signed,
    tensors,
    torn,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused
from safetensors import torch as safetensors

from mitrain.core.errors import CheckpointError
from mitrain.training import checkpoint


def entry(**changes) -> dict:
    return {"sha256": "0" * 64, "bytes": 3} | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 4, "files": "moved"}, "format 4.*upgrade mitrain"),
        ({"format": 0}, "no checkpoint manifest"),
        ({"format": True}, "no checkpoint manifest"),
        ({"format": None}, "no checkpoint manifest"),
        ({"step": -1}, "no checkpoint manifest"),
        ({"step": 1.5}, "no checkpoint manifest"),
        ({"sequence": "1"}, "no checkpoint manifest"),
        ({"best": 1}, "no checkpoint manifest"),
        ({"files": [1]}, "no checkpoint manifest"),
        ({"format": 2}, "format 2.*take another checkpoint"),
        ({"note": "x"}, "not the keys of format 3"),
        ({"mitrain": None}, "not the keys of format 3"),
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


NAMES = ("manifest.json", "state.json", "adapter.safetensors", "optimizer.safetensors")


def test_there_are_no_other_files(pristine):
    assert {path.name for path in pristine.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [1, 4, 255])
def test_a_changed_byte_anywhere_is_seen(pristine, tmp_path, name, bits):
    """In the manifest all but the spaces between its words, which another blank may replace."""
    path, original = shutil.copytree(pristine, tmp_path / "copy"), checkpoint.load(pristine)
    content = (pristine / name).read_bytes()
    for at in range(len(content)):
        (path / name).write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
        if read_or_refused(lambda: checkpoint.verify(path), CheckpointError):
            assert name == "manifest.json" and content[at : at + 1].isspace()
            found = checkpoint.load(path)
            assert (found.step, found.best, found.state) == (original.step, original.best, original.state)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_anywhere_is_seen(pristine, tmp_path, name):
    path = shutil.copytree(pristine, tmp_path / "copy")
    content = (pristine / name).read_bytes()
    for length in range(len(content)):
        (path / name).write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(path)


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


BAD = [
    torch.tensor([0.0, torch.nan]),
    torch.tensor([[torch.inf]], dtype=torch.float16),
    torch.tensor(-torch.inf, dtype=torch.bfloat16),
    torch.tensor([1.0, torch.nan], dtype=torch.float64),
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("group", ["adapter", "optimizer"])
def test_what_is_not_finite_is_not_published_and_removes_nothing(tmp_path, bad, group):
    kept = save(tmp_path, 1, keep=1)
    groups = tensors(2)
    groups[group]["gate.bad"] = bad
    with pytest.raises(CheckpointError, match=rf"step 2 is written: {group}.gate.bad \(1 of {bad.numel()} elements\)"):
        checkpoint.save(tmp_path, 2, groups, {}, keep=1, best=True)
    assert sorted(path.name for path in kept.parent.iterdir()) == [kept.name]


def test_a_state_that_is_not_finite_is_not_published(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path, 2, tensors(), {"engine": {"loss_scale": [float("nan"), 0]}})
    assert checkpoint.latest(tmp_path) is None and not checkpoint.any_published(tmp_path)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_one_that_is_not_finite_is_named_and_the_one_before_is_taken(tmp_path, caplog, name):
    good, bad = save(tmp_path, 1, best=True), save(tmp_path, 2, best=True)
    spoilt = safetensors.save({"w": torch.tensor([torch.nan])})
    signed(bad, name, b'{"best": NaN}' if name == "state.json" else spoilt)
    for find in (checkpoint.latest, checkpoint.best):
        caplog.clear()
        assert find(tmp_path) == good
        (record,) = caplog.records
        assert "step-00000002" in record.message and "cannot be used" in record.message


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 5)


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
