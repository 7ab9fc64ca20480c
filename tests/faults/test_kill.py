"""kill -9 at every file operation of what writes checkpoints and exports: the old or the new, and the same losses."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crash_worker import LAST_STEP, WATCHED
from crashes import Worker

from mitrain.methods import export_format
from mitrain.training import checkpoint

MUTATIONS = {"open", "write", "__exit__", "fsync", "chmod", "replace", "unlink", "rmdir", "mkdir"}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def hidden(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob(".step-*"))


def fresh(template: Path, run: Path) -> Path:
    shutil.rmtree(run, ignore_errors=True)
    return shutil.copytree(template, run)


def test_kills_at_random_moments_lose_at_most_the_step_being_written(worker, tmp_path):
    moments, longest, saved, torn, kills = random.Random(0), 0.25, 0, 0, 0
    while kills < 15 or not (saved and torn):
        assert kills < 60, "no kill fell into a write"
        kills += 1
        pid = worker.start("loop", tmp_path)
        time.sleep(moments.uniform(0.01, longest))
        os.kill(pid, signal.SIGKILL)
        ending = worker.wait()
        assert ending.status == -signal.SIGKILL
        saved = max(saved, ending.step)
        newest = checkpoint.latest(tmp_path)
        step = checkpoint.load(newest).step if newest else 0
        assert saved <= step <= saved + 1
        longest *= 1 if step else 1.5  # a busy machine saves its first later
        saved, torn = step, torn + bool(hidden(tmp_path))


@pytest.fixture(scope="module")
def template(worker, tmp_path_factory):
    """A run with three checkpoints and an unfinished one; every save names its file operations."""
    folder = tmp_path_factory.mktemp("template")
    for step in range(1, 4):
        ending = worker.run("save", folder)
        assert (ending.step, ending.status) == (step, 0)
        assert ending.names >= MUTATIONS - {"unlink", "rmdir"} and (step < 3 or ending.names >= MUTATIONS)
    shutil.copytree(folder / "checkpoints" / "step-00000003", folder / "checkpoints" / ".step-00000004.abandoned")
    return folder


def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new(worker, template, tmp_path):
    """Every operation of one save in turn, each on a copy of the run."""
    operation, killed, outcomes = 0, True, []
    while killed:
        operation += 1
        run = fresh(template, tmp_path / "run")
        ending = worker.run("save", run, operation)
        killed = ending.killed
        outcomes.append(checkpoint.load(checkpoint.latest(run)).step)
        visible = list((run / "checkpoints").glob("step-*"))
        assert all(checkpoint.verify(path) for path in visible), "a half-removed checkpoint is visible"
    assert ending.status == 0 and operation > 30
    assert outcomes == sorted(outcomes) and set(outcomes) == {3, 4}
    assert hidden(run) == []


def test_a_kill_in_the_middle_of_a_write_leaves_the_old(worker, template, tmp_path):
    """The kernel ends the process once a file grows beyond N bytes: everything up to there is on the disk."""
    longest = 128 * 128 * 4
    for size in (1, 16, 400, longest // 2, longest + 64):
        run = fresh(template, tmp_path / "run")
        shutil.rmtree(run / "checkpoints" / ".step-00000004.abandoned")
        assert worker.run("save", run, -size).killed, size
        assert checkpoint.load(checkpoint.latest(run)).step == 3
        assert any(file.stat().st_size == size for folder in hidden(run) for file in folder.iterdir())
        assert worker.run("save", run).step == 4 and hidden(run) == []


@pytest.fixture(scope="module")
def undisturbed(worker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert worker.run("train", folder).step == LAST_STEP
    return checkpoint.load(checkpoint.latest(folder))


def test_after_a_kill_at_any_file_operation_the_losses_are_those_of_the_undisturbed_run(worker, undisturbed, tmp_path):
    operation, killed, resumed_from = 0, True, set()
    while killed:
        operation += 1
        run = tmp_path / str(operation)
        killed = worker.run("train", run, operation).killed
        resumed_from.add(checkpoint.load(checkpoint.latest(run)).step)
        assert worker.run("train", run).step == LAST_STEP
        found = checkpoint.load(checkpoint.latest(run))
        assert found.state == undisturbed.state and len(found.state["losses"]) == LAST_STEP
        for name, tensor in undisturbed.tensors["adapter"].items():
            assert torch.equal(found.tensors["adapter"][name], tensor), name
    assert operation > 30 and resumed_from == {WATCHED - 1, WATCHED, LAST_STEP}


def test_a_kill_at_any_file_operation_of_an_export_leaves_nothing_or_all(worker, tmp_path):
    operation, killed, outcomes = 0, True, []
    while killed:
        operation += 1
        folder = tmp_path / str(operation)
        folder.mkdir()
        killed = worker.run("export", folder, operation).killed
        there = (folder / "adapter").exists()
        outcomes.append(there)
        if there:
            assert export_format.read(folder / "adapter").tensors["adapter"]["weight"].shape == (128, 128)
        else:
            assert worker.run("export", folder).status == 0 and export_format.read(folder / "adapter")
    assert operation > 15 and outcomes == sorted(outcomes) and set(outcomes) == {False, True}
    for size in (1, 500, 40_000):
        folder = tmp_path / f"torn{size}"
        folder.mkdir()
        assert worker.run("export", folder, -size).killed and not (folder / "adapter").exists()


@pytest.mark.slow
def test_the_trainer_itself_killed_at_any_file_operation_goes_on_with_the_same_losses(worker, tmp_path, monkeypatch):
    """`mitrain train --resume` after a kill in its second save; losses from metrics.jsonl, bit for bit."""
    from folders import colour_folder, run_settings

    from mitrain.training import runs, schema

    train = {"steps": LAST_STEP, "batch": 4, "save_every": 1, "eval_every": 9, "keep": 1}
    world = colour_folder(tmp_path, 8, 4, layers=2)
    config = schema.from_dict(run_settings(world, name="killed", features={"noise": 0.1}, train=train, cache=False))
    template = runs.create(config, tmp_path / "runs")

    def losses(run: Path) -> list[float]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if row["kind"] == "train"]

    expected = fresh(template, tmp_path / "undisturbed")
    assert worker.run("trainer", expected).step == LAST_STEP
    operation, killed = 0, True
    while killed:
        operation += 1
        run = fresh(template, tmp_path / "run")
        killed = worker.run("trainer", run, operation).killed
        assert worker.run("trainer", run).step == LAST_STEP
        assert losses(run) == losses(expected) and len(losses(run)) == LAST_STEP
        one, two = (checkpoint.load(checkpoint.latest(folder)) for folder in (run, expected))
        assert all(torch.equal(t, two.tensors[g][n]) for g, named in one.tensors.items() for n, t in named.items())
        assert one.state == two.state
    assert operation > 30
