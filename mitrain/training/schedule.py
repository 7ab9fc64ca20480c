"""Learning-rate schedules: linear warm-up, then a decay; pure arithmetic on the step number.

The rate depends on the step and the length of the run alone, so a resumed run continues on the same curve
without any state of its own. The engine is handed ``ScheduleConfig(...).over(steps)``, a function of the step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mitrain.core.config import Section

USED_BY = {
    "power": {"poly"},
    "every": {"step"},
    "factor": {"step", "multistep"},
    "milestones": {"multistep"},
    "floor": {"linear", "cosine", "poly"},
}


EVERY = "give a whole number of steps, a share of the run below 1, or epoch"


BOTH = "1.0 may be each step or the whole run: give 1 for the one, the number of the run's steps for the other"


def whole_or_share(value: Any) -> Any:
    if isinstance(value, float) and value == 1:
        raise ValueError(BOTH)
    number = value if isinstance(value, int | float) else 0
    if value != "epoch" and not 0 < number < 1 and not (number >= 1 and number % 1 == 0):
        raise ValueError(EVERY)
    return value


Every = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | Literal["epoch"],
    BeforeValidator(whole_or_share),
    Field(json_schema_extra={"errorMessage": EVERY}),
]
"""How often something is done: after so many steps, after a share of the run, or when an epoch is complete."""


@dataclass(frozen=True)
class Span:
    """How long a run is: its ``steps``, and how many of them an ``epoch`` takes, which need not be a whole number."""

    steps: int
    epoch: Fraction

    def due(self, every: int | float | str, step: int) -> bool:
        """Whether ``step`` (from 1) is one of `Every`."""
        if every == "epoch":
            return step // self.epoch > (step - 1) // self.epoch
        return step % max(1, steps_of(every, self.steps)) == 0


def span(steps: int | None, epochs: float | None, samples: int, batch: int) -> Span:
    """``steps``, or the fewest with ``batch`` samples each in which every one of ``samples`` comes ``epochs`` times."""
    epoch = Fraction(samples, batch)
    return Span(steps or math.ceil(Fraction(str(epochs)) * epoch), epoch)  # 0.1 as it is written, not as it is stored


class ScheduleConfig(Section):
    """Multiplier of every group's learning rate; ``poly`` has the power 0.9 of DeepLab (Chen et al. 2018, section 4.1)."""

    name: Literal["constant", "linear", "cosine", "poly", "step", "multistep"] = "cosine"
    warmup: float = Field(0, ge=0)
    floor: float = Field(0.0, ge=0, le=1)
    power: float = Field(0.9, gt=0)
    every: float | None = Field(None, gt=0)
    factor: float = Field(0.1, gt=0, le=1)
    milestones: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> "ScheduleConfig":
        for field, names in USED_BY.items():
            default = type(self).model_fields[field].default
            if getattr(self, field) != default and self.name not in names:
                raise ValueError(f"{field} has no effect on the schedule {self.name!r}: remove it")
        if self.name == "step" and self.every is None:
            raise ValueError("the schedule 'step' needs 'every': give the number of steps between two reductions")
        if self.name == "multistep" and not self.milestones:
            raise ValueError("the schedule 'multistep' needs 'milestones': list the steps at which to reduce")
        for value in (self.warmup, self.every or 0, *self.milestones):
            if value < 0 or (value > 1 and value != int(value)):
                raise ValueError(f"{value} is neither a whole number of steps nor a share of the run below 1")
        return self

    def over(self, total: int) -> Callable[[int], float]:
        """This schedule over ``total`` steps, as a function of the step number (from 0)."""
        return partial(multiplier, self, total=total)


def steps_of(value: float, total: int) -> int:
    """``value`` as a number of steps: itself, or a share of ``total`` when below 1."""
    return round(value * total) if value < 1 else int(value)


def multiplier(config: ScheduleConfig, step: int, total: int) -> float:
    """What the peak rate is multiplied by at ``step`` (from 0) of ``total``.

    Step i of the warm-up runs at (i + 1) / warmup, so no step is spent at rate zero; the decay then runs from 1 at
    the first step after the warm-up to ``floor``, which would be reached at step ``total``.
    """
    warmup = steps_of(config.warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    match config.name:
        case "constant":
            return 1.0
        case "step":
            return config.factor ** (step // max(1, steps_of(config.every, total)))
        case "multistep":
            return config.factor ** sum(step >= steps_of(m, total) for m in config.milestones)
        case "linear":
            shape = 1 - progress
        case "cosine":
            shape = (1 + math.cos(math.pi * progress)) / 2
        case "poly":
            shape = (1 - progress) ** config.power
    return config.floor + (1 - config.floor) * shape
