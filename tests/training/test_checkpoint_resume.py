"""What comes back from a checkpoint: modules, random states, and a run that continues bit for bit."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mitrain.core import dist
from mitrain.core.errors import CheckpointError
from mitrain.training import checkpoint


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
        lambda s: s.update(torch=f"!{s['torch']}"),
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


def test_why_a_random_state_is_broken_is_said_shortly(monkeypatch):
    state = checkpoint.rng_state()
    with pytest.raises(CheckpointError) as error:
        checkpoint.set_rng_state({"python": state["python"]})
    assert str(error.value) == "the saved random state cannot be read ('numpy'): take another checkpoint"
    monkeypatch.setattr(random, "setstate", lambda _: (_ for _ in ()).throw(ValueError("x" * 100)))
    with pytest.raises(CheckpointError, match=rf"\({'x' * 80}\)"):
        checkpoint.set_rng_state(state)


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_each_cuda_device_gets_its_own_state_back_and_those_of_absent_ones_are_left_out(monkeypatch, devices):
    kept = [torch.tensor([1, 2, 255], dtype=torch.uint8), torch.tensor([4, 0, 6], dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: kept)
    state, taken = json.loads(json.dumps(checkpoint.rng_state())), {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, device: taken.update({device: new}))
    checkpoint.set_rng_state(state)
    assert list(taken) == list(range(min(devices, 2)))
    assert all(torch.equal(new, kept[device]) and new.dtype == torch.uint8 for device, new in taken.items())


def test_the_numbers_after_a_seed_are_these_on_every_machine():
    """A run that goes on with another number of ranks draws what it would have drawn with an earlier version."""
    checkpoint.seed_rank(5, 8, 1)
    drawn = random.getrandbits(32), int(np.random.randint(2**31)), torch.initial_seed()
    assert drawn == (3517532243, 1800884107, 13914246928854520525)


@pytest.fixture
def place(monkeypatch):
    """Makes this process rank r of n, as far as the random states can tell."""

    def move(rank: int, world: int) -> None:
        monkeypatch.setattr(dist, "rank", lambda: rank)
        monkeypatch.setattr(dist, "world", lambda: world)

    return move


def of_ranks(place, world: int) -> list:
    """What ``rng_of_ranks`` gathers, each rank having drawn as many numbers as its own."""
    states = []
    for rank in range(world):
        place(rank, world)
        checkpoint.seed_rank(5, 0, rank)
        for _ in range(rank + 1):
            draw()
        states.append(checkpoint.rng_state())
    return json.loads(json.dumps(states))


def test_every_rank_goes_on_with_its_own_state(place):
    states = of_ranks(place, 3)
    for rank, state in enumerate(states):
        checkpoint.set_rng_state(state)
        expected = draw()
        place(rank, 3)
        assert checkpoint.resume_rng(states, seed=5, step=8) is True and draw() == expected
    assert len({str(state) for state in states}) == 3


def test_another_number_of_ranks_starts_anew_from_seed_step_and_rank(place):
    states, drawn = of_ranks(place, 2), []
    for rank, world, step in ((0, 3, 8), (1, 3, 8), (2, 3, 8), (0, 1, 8), (0, 3, 9)):
        place(rank, world)
        for _ in range(2):
            assert checkpoint.resume_rng(states, seed=5, step=step) is False
            drawn.append(draw())
    assert drawn[::2] == drawn[1::2]  # the same on every resume
    assert drawn[0] == drawn[6] and len({str(numbers) for numbers in drawn}) == 4


@pytest.mark.parametrize("saved", [None, [], "x", 3, [None], [{"python": 1}]])
def test_what_is_no_list_of_states_is_one_line(place, saved):
    place(0, 1)
    with pytest.raises(CheckpointError, match="random state") as caught:
        checkpoint.resume_rng(saved, 0, 1)
    assert "\n" not in str(caught.value)


TRAIN = '''
import random, sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
from mitrain.training import checkpoint
from mitrain.training.engine import Group, LocalEngine, OptimizerConfig

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
