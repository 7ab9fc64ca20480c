"""The loss scale of fp16: small gradients survive, large ones halve it, and a checkpoint carries it on."""

import pytest
import torch
from torch import nn

from mitrain.core.errors import CheckpointError
from mitrain.training.engine import FP16_SCALE, Group, LocalEngine, OptimizerConfig
from mitrain.training.engine.base import LossScale

PLAIN = OptimizerConfig(name="sgd", clip=None)


def test_it_is_halved_at_once_and_doubled_with_patience():
    scale = LossScale(8.0, patience=3)
    seen = []
    for finite in [True, True, False, True, True, True, True, True, True]:
        scale.update(finite)
        seen.append(scale.value)
    assert seen == [8, 8, 4, 4, 4, 8, 8, 8, 16]


def test_it_stays_within_its_bounds_and_one_stays_one():
    small, large, none = LossScale(2.0), LossScale(2.0**24, patience=1), LossScale()
    for scale, finite in ((small, False), (large, True), (none, False), (none, True)):
        scale.update(finite)
    assert (small.value, large.value, none.value) == (2.0, 2.0**24, 1.0)


def step(scale: float, size: float) -> tuple[LocalEngine, nn.Parameter, object]:
    """One step of a weight whose gradient goes through fp16 and is ``size``."""
    weight = nn.Parameter(torch.zeros(1))
    engine = LocalEngine([Group("w", {"w": weight}, 1.0)], lambda _: 1.0, PLAIN, scale)
    half = weight.half() * 1.0
    engine.backward((half.float() * size).sum(), 1)
    return engine, weight, engine.step()


def test_a_gradient_below_fp16_survives():
    """2⁻²⁵ rounds to 0 in fp16, whose smallest number is 2⁻²⁴."""
    assert step(1.0, 2.0**-25)[1].item() == 0.0
    _, weight, result = step(FP16_SCALE, 2.0**-25)
    assert weight.item() == -(2.0**-25) and result.grad_norm == 2.0**-25


def test_a_gradient_above_fp16_skips_the_step_and_halves_the_scale():
    engine, weight, result = step(FP16_SCALE, 1000.0)  # 4096 · 1000 is more than 65504
    assert (result.applied, result.reason, weight.item()) == (False, "non-finite gradient", 0.0)
    assert engine.scale.value == FP16_SCALE / 2


def test_a_checkpoint_carries_it():
    engine, _, _ = step(FP16_SCALE, 1000.0)
    other = LocalEngine([Group("w", {"w": nn.Parameter(torch.zeros(1))}, 1.0)], lambda _: 1.0, PLAIN, FP16_SCALE)
    other.load_state_dict(*engine.state_dict())
    assert (other.scale.value, other.scale.good) == (FP16_SCALE / 2, 0)
    plain = LocalEngine([Group("w", {"w": nn.Parameter(torch.zeros(1))}, 1.0)], lambda _: 1.0, PLAIN)
    plain.load_state_dict(*engine.state_dict())
    assert plain.scale.value == 1.0


@pytest.mark.parametrize("saved", [[0.5, 0], [float("nan"), 0], [4096.0, -1], ["x", 0], [4096.0], 4096.0])
def test_no_scale_is_refused(saved):
    engine, _, _ = step(1.0, 1.0)
    tensors, state = engine.state_dict()
    with pytest.raises(CheckpointError, match="loss_scale="):
        engine.load_state_dict(tensors, {**state, "loss_scale": saved})
