"""Damaged and forged run folders: whatever is wrong with one, a command ends well, or in one line and exit code 2."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import signed
from folders import colour_world, run_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import read_or_refused
from safetensors import torch as safetensors

from mitrain.cli import main
from mitrain.core.errors import UserError
from mitrain.training import runs, schema
from mitrain.training.trainer import Trainer

COMMANDS = ("eval", "predict", "resume", "report")
STEPS, STOPPED = 3, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("world"), 8, 4, layers=2) as path:
        yield path


@pytest.fixture(scope="module")
def pristine(world):
    """A run that was interrupted after ``STOPPED`` of ``STEPS`` steps, with one checkpoint."""
    train = {"steps": STEPS, "batch": 4, "save_every": STOPPED, "eval_every": STOPPED}
    config = schema.from_dict(run_settings(world, name="colours", train=train))
    folder = runs.create(config, world / "runs")
    trainer = Trainer(config, folder, quiet=True)
    steps = itertools.chain([trainer._step] * STOPPED, [interrupt])
    trainer._step = lambda: next(steps)()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    return folder


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def run(pristine, tmp_path):
    """A copy of the run to damage."""
    return shutil.copytree(pristine, tmp_path / "run")


def arguments(command: str, run: Path) -> list[str]:
    world = run.parent
    image = next((world_of(run) / "data" / "images").glob("*.png"))
    return {
        "eval": ["eval", str(run), "--split", "test", "--json"],
        "predict": ["predict", str(run), "--image", str(image), "--text", "the colour of this picture is", "--json"],
        "resume": ["train", "--resume", str(run), "--json"],
        "report": ["report", str(run), "--out", str(world / "report"), "--json"],
    }[command]


def world_of(run: Path) -> Path:
    return Path(os.environ["MITRAIN_CACHE"]).parent


def outcome(command: str, run: Path, capsys) -> str:
    """The line in which a command was refused, or "" if it went well. Anything else is a failure."""
    capsys.readouterr()
    code = main(arguments(command, run))
    out, err = capsys.readouterr()
    if code == 0:
        json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        return ""
    lines = [line for line in err.splitlines() if not line.startswith("run folder: ")]
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith("mitrain: "), (code, out, err)
    return lines[0]


def checkpoint_of(run: Path) -> Path:
    (path,) = (run / "checkpoints").glob("step-*")
    return path


def with_state(run: Path, *place: str | int, value: object) -> None:
    """Set one field of the checkpoint's state; it is removed where ``value`` is ``...``."""
    path = checkpoint_of(run) / "state.json"
    state = json.loads(path.read_text())
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is ...:
        del inner[place[-1]]
    signed(path.parent, path.name, json.dumps(state).encode())


def test_the_commands_go_well_with_a_folder_as_it_was_left(run, capsys):
    assert [outcome(command, run, capsys) for command in COMMANDS] == [""] * 4
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


# files that are not what they should be


def missing(path: Path) -> None:
    remove(path)


def empty(path: Path) -> None:
    remove(path)
    path.write_bytes(b"")


def cut(path: Path) -> None:
    content = path.read_bytes() if path.is_file() else b"xx"
    remove(path)
    path.write_bytes(content[: len(content) // 2])


def noise(path: Path) -> None:
    remove(path)
    path.write_bytes(bytes(range(256)))


def deep(path: Path) -> None:
    remove(path)
    path.write_bytes(b"[" * 5_000 + b"\n")


def folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def loop(path: Path) -> None:
    remove(path)
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    """Opening it for reading would wait for ever."""
    remove(path)
    os.mkfifo(path)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


DAMAGES = (missing, empty, cut, noise, deep, folder, loop, pipe)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_is_named(run, capsys, damage):
    damage(run / "config.yaml")
    for command in COMMANDS:
        assert "config.yaml" in outcome(command, run, capsys) or damage is cut


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_are_named_or_mended_on_resuming(run, capsys, damage):
    damage(run / "metrics.jsonl")
    refused = outcome("resume", run, capsys)
    assert ("metrics.jsonl" in refused) == (damage in (folder, loop, pipe))


@pytest.mark.parametrize("damage", [noise, folder, loop])
def test_a_damaged_summary_is_written_anew(run, capsys, damage):
    damage(run / "summary.json")
    refused = outcome("resume", run, capsys)
    assert ("summary.json" in refused) == (damage is folder)
    assert outcome("eval", run, capsys) == ""


@pytest.mark.parametrize("damage", [cut, deep, folder])
@pytest.mark.parametrize("name", ["manifest.json", "adapter.safetensors"])
def test_a_damaged_checkpoint_is_none_and_its_run_does_not_begin_again(run, capsys, name, damage):
    damage(checkpoint_of(run) / name)
    logged = (run / "metrics.jsonl").read_bytes()
    for command in ("eval", "resume"):
        assert "no complete checkpoint that can be used" in outcome(command, run, capsys)
    assert (run / "metrics.jsonl").read_bytes() == logged


def test_a_run_without_a_checkpoint_begins_by_its_configuration_alone(run, capsys):
    shutil.rmtree(run / "checkpoints")
    logged = (run / "metrics.jsonl").read_bytes()
    assert f"mitrain train {run}/config.yaml --run-dir {run}" in outcome("resume", run, capsys)
    assert (run / "metrics.jsonl").read_bytes() == logged
    assert main(["train", str(run / "config.yaml"), "--run-dir", str(run)]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_of_checkpoints_is_named(run, capsys, damage):
    damage(run / "checkpoints")
    for command in COMMANDS:
        refused = outcome(command, run, capsys)
        assert refused


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_run_folder_is_named(run, capsys, damage):
    damage(run)
    for command in COMMANDS:
        assert "is no run folder" in outcome(command, run, capsys)


# forged checkpoints: every checksum is right


STRANGE = (..., None, True, -1, 3, 2.5, 10**400, float("nan"), float("inf"), "x", [], [1], {}, {"x": "y"})
PLACES = [
    ("engine",), ("engine", "steps"), ("engine", "applied"), ("engine", "groups"), ("engine", "optimizer"),
    ("loader",), ("loader", "epoch"), ("loader", "position"), ("loader", "samples"),
    ("skips",), ("skips", "in_a_row"), ("skips", "reasons"),
    ("best",), ("best_step",), ("waited",), ("config",),
    ("rng",), ("rng", 0), ("rng", 0, "python"), ("rng", 0, "numpy"), ("rng", 0, "torch"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trainer(pristine):
    return Trainer(runs.read_config(pristine), pristine, quiet=True)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_forged_state_is_refused_in_one_line_or_trained_on(pristine, trainer, place, tmp_path):
    for number, value in enumerate(STRANGE):
        trainer.folder = shutil.copytree(pristine, tmp_path / f"copy{number}")
        with_state(trainer.folder, *place, value=value)
        finished = read_or_refused(trainer.fit, UserError)
        assert finished is None or finished.step == STEPS


def spoil(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes], bytes]:
    return lambda content: safetensors.save({n: change(t).contiguous() for n, t in safetensors.load(content).items()})


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("eval", "adapter"),
        ("predict", "adapter"),
        ("eval", "features"),
        ("resume", "features"),
        ("resume", "optimizer"),
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        spoil(lambda t: t.to(torch.int32)),
        spoil(lambda t: t.to(torch.complex64)),
        spoil(lambda t: t.to(torch.float8_e4m3fn)),
        spoil(lambda t: t[..., None]),
        spoil(lambda t: t * torch.nan if t.is_floating_point() else t),
        lambda content: b"",
        lambda content: b"\xff" * 64,
    ],
)
def test_forged_tensors_are_refused_or_used(run, capsys, command, name, change):
    path = checkpoint_of(run) / f"{name}.safetensors"
    signed(path.parent, path.name, change(path.read_bytes()))
    outcome(command, run, capsys)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]\n", "&a {b: *a}\n", "? [1, 2]\n: x\n", "!!python/object:os.system {}\n", "- 1\n", "name: 2026-13-45\n",
        "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghijk")
        ),
    ],
)  # fmt: skip
def test_a_hostile_configuration_is_one_line(run, capsys, text):
    (run / "config.yaml").write_text(text)
    assert outcome("eval", run, capsys)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def leaves(value: object, place: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(p for key, item in inner for p in leaves(item, (*place, key)))][0 if place else 1 :]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_in_the_configuration_is_refused_or_run(run, capsys, data, tmp_path):
    """Sizes stay as they are: a model of 10¹² layers is a fault of no command."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    values = yaml.safe_load((copy / "config.yaml").read_text())
    place = data.draw(st.sampled_from(leaves(values)))
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(JSON.filter(lambda value: not isinstance(value, int) or value < 10))
    (copy / "config.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    outcome(data.draw(st.sampled_from(COMMANDS)), copy, capsys)
