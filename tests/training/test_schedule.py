"""The curves' values at the points where they are known by hand, and torch's own schedulers as the reference."""

import math

import pytest
import torch

from mitrain.core.config import parse
from mitrain.core.errors import ConfigError
from mitrain.training.schedule import ScheduleConfig


def curve(total: int, **settings) -> list[float]:
    rate = ScheduleConfig(**settings).over(total)
    return [rate(step) for step in range(total)]


def torch_curve(total: int, make) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_warm_up_never_spends_a_step_at_zero_and_ends_at_the_peak():
    rates = curve(10, name="constant", warmup=4)
    assert rates == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6


def test_the_decay_starts_at_the_peak_right_after_the_warm_up():
    for name in ("linear", "cosine", "poly"):
        rates = curve(20, name=name, warmup=5)
        assert rates[4] == rates[5] == 1.0
        assert all(later < earlier for earlier, later in zip(rates[5:], rates[6:], strict=False))
        assert rates[-1] > 0


def test_linear_and_floor():
    assert curve(4, name="linear") == [1.0, 0.75, 0.5, 0.25]
    assert curve(4, name="linear", floor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4], rel=1e-15)


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"name": "cosine"}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30)),
        ({"name": "poly"}, lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 30, power=0.9)),
        ({"name": "step", "every": 7}, lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.1)),
        (
            {"name": "multistep", "milestones": [3, 20], "factor": 0.4},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 20], 0.4),
        ),
    ],
)
def test_equals_torch_schedulers(settings, make):
    # torch's recursive forms multiply 30 rates one after the other: 30 roundings of 1.1e-16 relative to the peak.
    assert curve(30, **settings) == pytest.approx(torch_curve(30, make), rel=1e-12, abs=30 * 1.2e-16)


def test_values_below_one_are_shares_of_the_run():
    assert curve(40, name="cosine", warmup=0.1) == curve(40, name="cosine", warmup=4)
    assert curve(40, name="multistep", milestones=[0.3, 0.6]) == curve(40, name="multistep", milestones=[12, 24])
    assert curve(40, name="step", every=0.25) == curve(40, name="step", every=10)


def test_defined_beyond_the_end_and_when_the_warm_up_is_longer_than_the_run():
    rate = ScheduleConfig(name="cosine", floor=0.1).over(10)
    assert rate(10) == rate(500) == pytest.approx(0.1, rel=1e-15)
    assert curve(3, warmup=30) == [1 / 30, 2 / 30, 3 / 30]
    assert all(math.isfinite(value) for value in curve(1, name="step", every=0.1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "cosin"}, "cosine"),
        ({"name": "cosine", "milestones": [3]}, "no effect"),
        ({"name": "constant", "power": 2}, "no effect"),
        ({"name": "step"}, "'every'"),
        ({"name": "multistep"}, "'milestones'"),
        ({"warmup": 2.5}, "whole number"),
        ({"name": "multistep", "milestones": [-3]}, "whole number"),
        ({"warmup": -1}, "greater than or equal"),
        ({"name": "step", "every": float("nan")}, "finite"),
    ],
)
def test_bad_settings_are_one_line(settings, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse(ScheduleConfig, settings, "train.schedule")
    assert "\n" not in str(caught.value) and "train.schedule" in str(caught.value)


def test_a_resolved_configuration_reads_back():
    config = ScheduleConfig(name="poly", warmup=3)
    assert parse(ScheduleConfig, config.to_dict()) == config
