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

from mitrain import checkpoint
from mitrain.errors import CheckpointError


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
