"""Before the first step: the disk and the memory are looked at, and the run is the same as without."""

import resource
from types import SimpleNamespace

import pytest
import torch
from folders import colour_world, run_settings

from mitrain.core.errors import CheckpointError
from mitrain.training import checkpoint, preflight, runs, schema
from mitrain.training.trainer import Trainer

TRAIN = {"steps": 6, "batch": 3, "accumulate": 2, "lr": 1e-2, "eval_every": 3, "save_every": 3, "keep": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("preflight")) as path:
        yield path


def configured(world, **train) -> schema.RunConfig:
    features = {"views": 2, "noise": 0.1, "dropout": 0.2}
    return schema.from_dict(run_settings(world, features=features, train=TRAIN | train))


def made(world, **train) -> Trainer:
    config = configured(world, **train)
    return Trainer(config, runs.create(config, world / "runs"), quiet=True)


def trained(world, monkeypatch, worth: int, **train) -> tuple[dict, list[int]]:
    """The tensors of a run's last checkpoint and the sizes of the batches that it tried first."""
    tried = []
    check = preflight.check_memory
    monkeypatch.setattr(preflight, "WORTH", worth)
    monkeypatch.setattr(preflight, "check_memory", lambda trainer: (tried.append(1), check(trainer)))
    trainer = made(world, **train)
    trainer.fit()
    monkeypatch.undo()
    saved = checkpoint.load(checkpoint.latest(trainer.folder))
    return {"rng": saved.state["rng"], **saved.tensors}, tried


def same(one: dict, other: dict) -> bool:
    return one["rng"] == other["rng"] and all(
        torch.equal(tensor, other[group][name])
        for group in ("adapter", "head", "optimizer")
        for name, tensor in one[group].items()
    )


def test_the_largest_batch_leaves_no_trace(world, monkeypatch):
    """Dropout draws random numbers in the trial, and the optimizer has no states yet."""
    tried, checked = trained(world, monkeypatch, 12)
    plain, unchecked = trained(world, monkeypatch, 12, check_largest="off")
    assert (checked, unchecked) == ([1], []) and same(tried, plain)
    assert trained(world, monkeypatch, 13)[1] == []  # of a shorter run than that it is too large a part


def test_buffers_random_numbers_and_gradients_are_put_back():
    module = torch.nn.BatchNorm1d(3)
    before = {name: b.clone() for name, b in module.named_buffers()}
    state = torch.get_rng_state()
    with preflight.untouched([module]):
        module(torch.randn(4, 3))
        module.running_mean = torch.zeros(3) + 7
    assert all(torch.equal(before[name], b) for name, b in module.named_buffers())
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_the_samples_with_the_most_tokens_and_every_rank_has_some(world, monkeypatch):
    tokens = {"a": 3, "b": 9, "c": 5, "d": 7, "e": 1}
    task = SimpleNamespace(tokens=lambda samples: sum(tokens[s] for s in samples))
    trainer = SimpleNamespace(
        train=list(tokens), model=SimpleNamespace(task=task), config=SimpleNamespace(train=SimpleNamespace(batch=4))
    )
    assert [draw.sample for draw in preflight.longest(trainer)] == ["b", "d", "c", "a"]
    monkeypatch.setattr(preflight.dist, "world", lambda: 2)
    assert [draw.sample for draw in preflight.longest(trainer)] == ["b", "c", "d", "a"]
    trainer.config.train.batch = 7  # more than there are
    assert sorted(draw.sample for draw in preflight.longest(trainer)) == ["a", "b", "b", "c", "d", "d", "e"]


def test_too_little_memory_is_told_with_a_table_before_the_first_step(world, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "WORTH", 1)
    trainer = made(world)

    def refuse(*_):
        raise RuntimeError("[enforce fail at alloc.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr(trainer, "_accumulate", refuse)
    with pytest.raises(preflight.OutOfMemory, match=r"3 samples of up to \d+ tokens on a rank.*train.batch") as caught:
        trainer.fit()
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    found = caught.value.document["out_of_memory"]
    frozen = [p for m in trainer.model.frozen.values() for p in m.parameters()]
    params = sum(p.nbytes for p in trainer.engine.params.values())
    # The cache stands for the others.
    assert found["frozen_weights"] == sum(map(preflight.held, frozen)) < sum(p.nbytes for p in frozen)
    assert (found["trained_weights"], found["gradients"], found["optimizer"]) == (params, params, 2 * params)
    assert found["samples"] == 3 and found["there"] > 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "rank 0 ran out of memory in the largest batch:" and len(lines) == 7
    assert lines[2].split() == ["trained", "weights", *preflight.size(params).split()]
    assert not (trainer.folder / "checkpoints").exists()


def test_another_error_is_not_taken_for_it(world, monkeypatch):
    monkeypatch.setattr(preflight, "WORTH", 1)
    trainer = made(world)
    monkeypatch.setattr(trainer, "_accumulate", lambda *_: [][1])
    with pytest.raises(IndexError):
        trainer.fit()


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_first_step(world, monkeypatch):
    trainer = made(world)
    one = preflight.checkpoint_bytes(trainer)
    usage = SimpleNamespace(free=2 * one)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)
    trainer.config = configured(world, save_every=1)
    with pytest.raises(CheckpointError, match=rf"need {preflight.size(3 * one)} \(3 of .*make room there, lower train.keep"):
        trainer.fit()
    assert (trainer.folder / "metrics.jsonl").read_bytes() == b"" and not (trainer.folder / "checkpoints").exists()
    usage.free = 3 * one
    trainer.fit()
    written = checkpoint.latest(trainer.folder)
    assert 0 < sum(path.stat().st_size for path in written.glob("*.safetensors")) - one < 20_000  # their headers


def test_how_many_checkpoints_stand_at_once(world):
    trainer = made(world)
    trainer.config = configured(world, keep=2, save_every=1)
    assert preflight.checkpoints_to_come(trainer, 0) == 4
    assert preflight.checkpoints_to_come(trainer, 5) == 2
    trainer.config = configured(world, keep=5)
    assert preflight.checkpoints_to_come(trainer, 0) == 3


def test_memory_there_is_the_least_of_what_bounds_a_process(monkeypatch, tmp_path):
    whole = preflight.memory_there()
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "self").write_text("3:cpuset:/\n0::/job/step\n")
    monkeypatch.setattr(preflight.memory, "GROUPS", tmp_path)
    monkeypatch.setattr(preflight.memory, "OF_THIS", tmp_path / "self")
    group = tmp_path / "job" / "memory.max"
    group.write_text("max\n")
    assert preflight.memory_there() >= whole
    group.write_text("4096\n")
    assert preflight.memory_there() == 4096
    monkeypatch.setattr(resource, "getrlimit", lambda which: (512, 512))
    assert preflight.memory_there() == 512


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.23 KB"), (5.6e9, "5.6 GB"), (7e12, "7 TB")]
)
def test_sizes_in_words(count, text):
    assert preflight.size(count) == text
