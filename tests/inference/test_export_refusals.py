"""Exports that are torn, forged or in the way: one line each, and never a half-written folder."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import dangling, folder, linked, looped, missing, pipe, torn
from exported import resigned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused
from safetensors import torch as safetensors

import mitrain
from mitrain.cli import main
from mitrain.core.errors import CheckpointError, UserError
from mitrain.inference.export import export
from mitrain.methods import export_format

FILES = ("mitrain.json", "mitrain.safetensors")


@pytest.fixture(scope="module")
def pristine(world, run):
    export(run, world / "exported")
    return world / "exported"


@pytest.fixture
def copied(pristine, tmp_path):
    """A copy of the export to damage."""
    return shutil.copytree(pristine, tmp_path / "copy")


def with_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((path / FILES[0]).read_text())
    change(values)
    (path / FILES[0]).write_text(json.dumps(resigned(values)))


def with_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.load_file(path / FILES[1])
    change(tensors)
    with_weights(path, safetensors.save(tensors))


def with_weights(path: Path, content: bytes) -> None:
    (path / FILES[1]).write_bytes(content)
    summed = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    with_config(path, lambda values: values.update(tensors=summed))


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value, as the keys and indices that lead there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def put(values: Any, path: tuple, new: Any) -> Any:
    """A copy of ``values`` with another value in a place; ``...`` removes it."""
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    if new is ...:
        del inner[path[-1]]
    return values


def typed_places(values: dict[str, Any]) -> list[tuple]:
    """The places whose type the format lays down; what the sections of a configuration hold is their own matter."""
    free = (("run", "config"), ("run", "answers"), ("run", "metrics"), ("adapter",))
    return [path for path in places(values) if not any(path[: len(f)] == f and path != f for f in free)]


def refused(read: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_must_be_there_and_of_its_type(copied):
    values = json.loads((copied / FILES[0]).read_text())
    checked = 0
    for place in typed_places(values):
        wrong = [1] if isinstance(get(values, place), dict) else {"x": 1}
        required = isinstance(place[-1], str) and place[0] != "frozen"  # earlier versions wrote no digests
        for new in (..., wrong) if required else (wrong,):
            forged = put(values, place, new)
            (copied / FILES[0]).write_text(json.dumps(forged if "checksum" in place else resigned(forged)))
            message = refused(lambda: export_format.read(copied))
            assert str(copied) in message and (str(place[-1]) in message or "format" in place)
            checked += 1
    assert checked > 80


def get(values: Any, path: tuple) -> Any:
    for key in path:
        values = values[key]
    return values


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 4}, "format 4, written by mitrain 0.1.0; this version reads format 3: upgrade mitrain"),
        ({"format": 2}, "this version reads format 3: export it again"),
        ({"format": True}, "names no format"),
        ({"format": 0}, "names no format"),
        ({"note": 1}, "unknown key 'note'"),
        ({"parameters": {"trainable": -1, "frozen": 1}}, "parameters.trainable=-1"),
        ({"parameters": {"trainable": "3", "frozen": 1}}, "parameters.trainable='3'"),
        ({"parameters": {"trainable": 1.5, "frozen": 1}}, "parameters.trainable=1.5"),
        ({"tensors": {"sha256": "0" * 63, "bytes": 3}}, "tensors.sha256"),
        ({"tensors": {"sha256": "0" * 64, "bytes": 3}}, "safetensors is longer than the 3 bytes"),
        ({"tensors": {"sha256": "0" * 64, "bytes": 10**9}}, "safetensors is torn or corrupted"),
    ],
)
def test_what_a_forger_may_write(copied, change, says):
    with_config(copied, lambda values: values.update(change))
    assert says in refused(lambda: export_format.read(copied))


NOT_JSON = [
    b"",
    b"[]",
    b"null",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"format": NaN}',
    b'{"format": ' + b"1" * 5000 + b"}",
]


@pytest.mark.parametrize("content", NOT_JSON)
def test_hostile_json_is_one_line(copied, content):
    (copied / FILES[0]).write_bytes(content)
    assert FILES[0] in refused(lambda: export_format.read(copied))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_seen(pristine, copied, name):
    """But in the base's name, which may be edited, and between the words of the JSON."""
    original, content = export_format.read(pristine).contents, (pristine / name).read_bytes()
    seen = 0
    for at in range(0, len(content), max(1, len(content) // 300)):
        (copied / name).write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        found = read_or_refused(lambda: export_format.read(copied), CheckpointError)
        editable = {"base_model_name_or_path": original.base_model_name_or_path}
        assert found is None or found.contents.model_copy(update=editable) == original
        seen += found is None
    assert seen > 200


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_seen(copied, name):
    content = (copied / name).read_bytes()
    for length in (*range(0, len(content), max(1, len(content) // 60)), len(content) - 1):
        (copied / name).write_bytes(content[:length])
        assert name in refused(lambda: export_format.read(copied))


@pytest.mark.parametrize("damage", [missing, torn, linked, dangling, looped, folder, pipe])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_missing_or_none_are_named(copied, name, damage):
    damage(copied / name)
    assert name in refused(lambda: mitrain.from_pretrained(copied))


def test_a_pickle_in_disguise_is_refused(copied, tmp_path):
    torch.save({"adapter.w": torch.ones(1)}, tmp_path / "pickle")
    with_weights(copied, (tmp_path / "pickle").read_bytes())
    assert "not a safetensors file" in refused(lambda: mitrain.from_pretrained(copied))


def poison(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = torch.nan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({"adapter.more": torch.ones(1)}), "more is unknown"),
        (lambda t: t.update({"base.weight": torch.ones(1)}), "base.weight is unknown"),
        (lambda t: t.update({"adapter": torch.ones(1)}), "adapter is unknown"),
        (lambda t: t.pop("features.mean"), "mean is missing"),
        (lambda t: t.update({"features.mean": torch.ones(2)}), "mean has shape [2], here [48]"),
        (lambda t: t.pop("adapter.infused.1.head_logit"), "infused.1.head_logit is missing"),
        (poison, "holds what is not finite"),
    ],
)
def test_tensors_that_are_not_the_adapters_are_named(copied, change, says):
    with_tensors(copied, change)
    assert says in refused(lambda: mitrain.from_pretrained(copied))


def test_a_forged_value_anywhere_is_refused_or_loaded(copied):
    """Also in the configuration that it brings: whatever stands there, no traceback."""
    values = json.loads((copied / FILES[0]).read_text())
    strange = st.sampled_from((..., None, True, -1, 2.5, 10**40, "x", "../x", [], [1], {}, {"x": "y"}))

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(place=st.sampled_from(list(places(values))), new=strange)
    def check(place, new):
        (copied / FILES[0]).write_text(json.dumps(resigned(put(values, place, new))))
        read_or_refused(lambda: mitrain.from_pretrained(copied), UserError)

    check()


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_the_commands_end_in_one_line_and_exit_code_2(copied, capsys, command):
    torn(copied / FILES[1])
    more = ["--image", str(copied / FILES[1]), "--text", "x"] if command == "predict" else []
    assert main([command, str(copied), *more, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "is torn or corrupted" in err


# writing


def test_a_target_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        assert "exists and is not an empty folder" in refused(lambda: export(run, tmp_path / name))  # noqa: B023
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    assert {p.name for p in tmp_path.iterdir()} == {"full", "file", "link", "empty"}
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_run_without_a_checkpoint_or_of_another_configuration_is_named(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "run")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("rank: 3", "rank: 5"))
    assert "does not fit: infused.1.maps.image.ffn.weight has shape" in refused(lambda: export(other, tmp_path / "out"))
    shutil.rmtree(other / "checkpoints")
    assert main(["export", str(other), "--out", str(tmp_path / "out")]) == 2
    assert "has no complete checkpoint yet" in capsys.readouterr().err
    assert "is no run folder" in refused(lambda: export(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_does_not_read_back_is_not_published(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: self.touch())
    assert "is torn or corrupted" in refused(lambda: export(run, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
