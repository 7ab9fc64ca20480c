"""The step: true-count normalisation, skipping, clipping, and optimizer state that survives by name."""

import math

import pytest
import torch
from torch import nn

from mitrain.core.config import parse
from mitrain.core.errors import CheckpointError, ConfigError, ModelError
from mitrain.training.engine import Group, LocalEngine, OptimizerConfig, cut_group

PLAIN = OptimizerConfig(name="sgd", clip=None)


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def engine_for(module: nn.Module, config: OptimizerConfig = PLAIN, lr: float = 0.1, decay: float = 0.0, schedule=None):
    return LocalEngine([Group("net", dict(module.named_parameters()), lr, decay)], schedule or (lambda _: 1.0), config)


def samples(seed: int, count: int = 12, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, width, generator=generator, dtype=dtype) for width in (5, 1))


def feed(engine: LocalEngine, module: nn.Module, x, y, cuts: list[int]) -> None:
    for part_x, part_y in zip(x.split(cuts), y.split(cuts), strict=True):
        engine.backward(((module(part_x) - part_y) ** 2).sum(), len(part_x))


@pytest.mark.parametrize("config", [PLAIN, OptimizerConfig(clip=0.05), OptimizerConfig(clip=0.01, clip_by="value")])
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [11, 1], [0, 12, 0]])
def test_cutting_a_batch_into_micro_batches_changes_nothing(config, cuts):
    weights, results = [], []
    for split in ([12], cuts):
        module = net()
        engine = engine_for(module, config)
        for seed in range(4):
            feed(engine, module, *samples(seed), split)
            results.append(engine.step())
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    # float64 rounding 1.1e-16, sums of 12, Adam's division by a root amplifies it: 1e-12 leaves four digits of room.
    assert torch.allclose(*weights, rtol=1e-12, atol=1e-12)
    for whole, cut in zip(results[:4], results[4:], strict=True):
        assert (whole.count, whole.applied) == (cut.count, cut.applied) == (12, True)
        assert whole.loss == pytest.approx(cut.loss, rel=1e-12)
        assert whole.grad_norm == pytest.approx(cut.grad_norm, rel=1e-12)


def test_the_update_is_the_gradient_of_the_mean():
    module, (x, y) = net(), samples(3)
    mean = ((module(x) - y) ** 2).mean()
    gradients = torch.autograd.grad(mean, module.parameters())
    expected = [p - 0.1 * g for p, g in zip(module.parameters(), gradients, strict=True)]
    engine = engine_for(module)
    feed(engine, module, x, y, [4, 8])
    result = engine.step()
    assert result.loss == pytest.approx(mean.item(), rel=1e-12)
    assert all(torch.allclose(p, e, rtol=1e-12) for p, e in zip(module.parameters(), expected, strict=True))


def test_counts_may_be_tensors_and_fractions():
    module, (x, y) = net(), samples(0)
    engine = engine_for(module)
    engine.backward(((module(x) - y) ** 2).sum(), torch.tensor(7.5))
    assert engine.step().count == 7.5


def test_an_empty_micro_batch_counts_for_nothing_whatever_its_loss():
    module, (x, y) = net(), samples(0)
    engine = engine_for(module)
    engine.backward(torch.tensor(math.nan), 0)  # the mean over no tokens: NaN, and no graph behind it
    feed(engine, module, x, y, [12])
    engine.backward(module(x[:0]).mean(), 0)
    result = engine.step()
    assert result.applied and result.count == 12


@pytest.mark.parametrize("count", [-1, math.nan, math.inf])
def test_an_impossible_count_is_refused(count):
    module, (x, _) = net(), samples(0)
    with pytest.raises(ValueError, match="count"):
        engine_for(module).backward(module(x).sum(), count)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_one_step_equals_the_optimizer_written_by_hand(optimizer):
    """AdamW: Loshchilov and Hutter 2019, algorithm 2, first step; Adam and SGD add the decay to the gradient."""
    param = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    config = OptimizerConfig(name=optimizer, clip=None)
    engine = LocalEngine([Group("g", {"w": param}, 0.1, weight_decay=0.01)], lambda _: 0.5, config)
    start, gradient, lr = param.detach().clone(), torch.tensor([3.0, 4.0], dtype=torch.float64), 0.05
    engine.backward((param * gradient * 10).sum(), 10)
    result = engine.step()
    coupled = gradient + 0.01 * start
    expected = {
        "adamw": start * (1 - lr * 0.01) - lr * gradient / (gradient.abs() + 1e-8),
        "adam": start - lr * coupled / (coupled.abs() + 1e-8),
        "sgd": start - lr * coupled,
    }[optimizer]
    assert torch.allclose(param, expected, rtol=1e-12)
    assert (result.lr, result.grad_norm) == (pytest.approx(lr), pytest.approx(5.0, rel=1e-12))


@pytest.mark.parametrize(("clip_by", "expected"), [("norm", [0.6, 0.8]), ("value", [1.0, 1.0]), (None, [3.0, 4.0])])
def test_clipping_by_norm_and_by_value(clip_by, expected):
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    config = OptimizerConfig(name="sgd", clip=clip_by and 1.0, clip_by=clip_by or "norm")
    engine = LocalEngine([Group("g", {"w": param}, 1.0)], lambda _: 1.0, config)
    engine.backward((param * torch.tensor([3.0, 4.0])).sum(), 1)
    assert engine.step().grad_norm == pytest.approx(5.0)
    # torch divides by (norm + 1e-6) to stay clear of 0 / 0
    assert torch.allclose(-param, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)


def poison_loss(engine, module, x):
    engine.backward(module(x).sum() * math.nan, len(x))


def poison_gradient(engine, module, x):
    """sqrt at 0: the loss is 0, its derivative infinite times zero."""
    engine.backward((module(x) * 0).abs().sqrt().sum(), len(x))


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (poison_loss, "non-finite loss"),
        (poison_gradient, "non-finite gradient"),
        (lambda engine, module, x: engine.backward(module(x[:0]).sum(), 0), "no samples"),
        (lambda engine, module, x: None, "no samples"),
    ],
)
def test_a_bad_step_is_skipped_with_its_reason_and_leaves_no_trace(poison, reason):
    module, (x, y) = net(), samples(0)
    engine = engine_for(module, OptimizerConfig())
    feed(engine, module, x, y, [12])
    assert engine.step().applied
    weights = [p.detach().clone() for p in module.parameters()]
    moments = {name: t.clone() for name, t in engine.state_dict()[0].items()}
    if reason != "no samples":
        feed(engine, module, x, y, [12])  # one good micro-batch does not save a bad one
    poison(engine, module, x)
    result = engine.step()
    assert (result.applied, result.reason) == (False, reason)
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    assert all(torch.equal(t, moments[name]) for name, t in engine.state_dict()[0].items())
    assert all(p.grad is None for p in module.parameters())
    assert (engine.steps, engine.applied) == (2, 1)
    feed(engine, module, x, y, [12])
    assert engine.step().applied


def test_the_rate_follows_the_data_through_skipped_steps_and_every_group_has_its_own():
    a, b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    engine = LocalEngine([Group("a", {"a": a}, 1.0), Group("b", {"b": b}, 10.0)], lambda step: 1 / (1 + step), PLAIN)
    rates = []
    for skip in (False, True, False):
        if not skip:
            engine.backward(a.sum() + b.sum(), 1)
        rates.append(engine.step().lr)
    assert rates == [1, 1 / 2, 1 / 3]
    assert a.item() == pytest.approx(-(1 + 1 / 3)) and b.item() == pytest.approx(-10 * (1 + 1 / 3))


def test_a_parameter_without_gradient_is_left_alone():
    module = net()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    params = {**dict(module.named_parameters()), "unused": unused}
    engine = LocalEngine([Group("net", params, 0.1, weight_decay=0.5)], lambda _: 1.0)
    feed(engine, module, *samples(0), [12])
    assert engine.step().applied
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))
    assert not any(name.endswith(".unused") for name in engine.state_dict()[0])


def test_frozen_repeated_and_missing_parameters_are_refused():
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    shared = nn.Parameter(torch.zeros(1))
    for groups, says in [
        ([Group("base", {"w": frozen}, 0.1)], "'w' in group 'base' is frozen"),
        ([Group("a", {"w": shared}, 0.1), Group("b", {"v": shared}, 0.1)], "already given as 'w'"),
        ([Group("a", {"w": shared}, 0.1), Group("b", {"w": nn.Parameter(torch.ones(1))}, 0.1)], "already given as 'w'"),
        ([Group("a", {}, 0.1)], "nothing to train"),
        ([], "nothing to train"),
    ]:
        with pytest.raises(ModelError, match=says):
            LocalEngine(groups, lambda _: 1.0)


def test_an_empty_group_beside_a_full_one_is_ignored():
    module = net()
    groups = [Group("adapter", {}, 9.0), Group("net", dict(module.named_parameters()), 0.1)]
    engine = LocalEngine(groups, lambda _: 1.0, PLAIN)
    feed(engine, module, *samples(0), [12])
    assert engine.step().lr == 0.1


@pytest.mark.parametrize("settings", [{"betas": [0.9, 1.0]}, {"eps": 0}, {"clip": 0}, {"name": "adamq"}, {"clips": 1}])
def test_bad_optimizer_settings_are_configuration_errors(settings):
    with pytest.raises(ConfigError, match="optimizer"):
        parse(OptimizerConfig, settings, "optimizer")


@pytest.mark.parametrize("config", [OptimizerConfig(), OptimizerConfig(name="sgd", momentum=0.9), PLAIN])
def test_state_moves_to_another_engine_bit_for_bit(config):
    straight, module = net(dtype=torch.float32), net(dtype=torch.float32)
    decay = {"schedule": lambda step: 0.9**step, "decay": 0.01}
    one, two = engine_for(straight, config, **decay), engine_for(module, config, **decay)
    for seed in range(10):
        if seed == 5:
            tensors, state = two.state_dict()
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            two = engine_for(module, config, **decay)
            two.load_state_dict(tensors, state)
            tensors.clear()
        for engine, model in ((one, straight), (two, module)):
            feed(engine, model, *samples(seed, dtype=torch.float32), [7, 5])
        assert one.step() == two.step()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), module.parameters(), strict=True))
    assert (two.steps, two.applied) == (10, 10)


def test_moments_are_named_by_slot_and_parameter():
    module = net()
    engine = engine_for(module, OptimizerConfig())
    assert engine.state_dict()[0] == {}
    feed(engine, module, *samples(0), [12])
    engine.step()
    tensors, state = engine.state_dict()
    names = dict(module.named_parameters())
    assert set(tensors) == {f"{slot}.{name}" for slot in ("exp_avg", "exp_avg_sq", "step") for name in names}
    assert tensors["exp_avg.0.weight"].shape == names["0.weight"].shape
    assert state["groups"] == {"net": sorted(names)}


@pytest.mark.parametrize(
    ("says", "breaks"),
    [
        ("has shape", lambda t, s: t.update({"exp_avg.0.bias": torch.zeros(3)})),
        ("belongs to no parameter", lambda t, s: t.update({"exp_avg.9.bias": torch.zeros(3)})),
        ("belongs to no parameter", lambda t, s: t.update({"nonsense": torch.zeros(3)})),
        ("lacks", lambda t, s: t.pop("exp_avg_sq.0.bias")),
        ("optimizer is sgd, here adamw", lambda t, s: s.update(optimizer="sgd")),
        ("only saved: \\['more'\\]", lambda t, s: s["groups"]["net"].append("more")),
        ("differ in 'head'", lambda t, s: s["groups"].update(head=["a"])),
        ("steps=-1", lambda t, s: s.update(steps=-1)),
        ("applied='x'", lambda t, s: s.update(applied="x")),
        ("optimizer is None", lambda t, s: s.clear()),
    ],
)
def test_a_state_of_another_run_is_refused_in_one_line_and_changes_nothing(says, breaks):
    module = net()
    engine = engine_for(module, OptimizerConfig())
    feed(engine, module, *samples(0), [12])
    engine.step()
    tensors, state = engine.state_dict()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    breaks(tensors, state)
    with pytest.raises(CheckpointError, match=says):
        engine.load_state_dict(tensors, state)
    after, state = engine.state_dict()
    assert state["steps"] == 1 and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_a_group_is_cut_by_the_beginnings_of_names_and_the_longest_counts():
    names = ["adapter.others.0", "adapter.others.1", "adapter.prompts.0", "head.weight"]
    params = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    whole = Group("adapter", params, 4e-4, 0.1)
    rest, others, one = cut_group(whole, {"adapter.others": 5e-4, "adapter.others.1": 6e-4, "nothing": 1.0})
    assert (rest.lr, list(rest.params)) == (4e-4, ["adapter.prompts.0", "head.weight"])
    assert (others.lr, list(others.params)) == (5e-4, ["adapter.others.0"])
    assert (one.lr, list(one.params)) == (6e-4, ["adapter.others.1"])
    assert {part.weight_decay for part in (rest, others, one)} == {0.1}
    assert len({part.name for part in (rest, others, one)}) == 3 and rest.name == "adapter"
    assert cut_group(whole, {})[0] == whole
