"""The training step: accumulate gradients of a *sum*, divide by the true count, clip, apply or say why not.

A loss is always handed in as ``(sum, count)``: the gradient of the sum is accumulated and divided once, by the
number of samples (or tokens, or pixels) that the whole step really saw. How a batch is cut into micro-batches, and
how full each of them is, therefore changes nothing. ``step()`` never applies a non-finite update; it says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import Field
from torch import Tensor, nn

from mitrain.core.config import Section

T = TypeVar("T")
FP16_SCALE = 2.0**12
"""The loss scale that fp16 begins with. The losses are sums over a micro-batch, larger than the usual means."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Sums = tuple[Tensor, Tensor | float]  # a loss as (sum, count)


class OptimizerConfig(Section):
    """Optimizer and gradient clipping (the MiT release clips values at 1.0); rates belong to the parameter groups."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    clip: float | None = Field(1.0, gt=0)
    clip_by: Literal["norm", "value"] = "norm"


@dataclass(frozen=True)
class Group:
    """Named trainable parameters that share a peak learning rate and a weight decay."""

    name: str
    params: Mapping[str, nn.Parameter]
    lr: float
    weight_decay: float = 0.0


def cut_group(group: Group, rates: Mapping[str, float]) -> list[Group]:
    """``group`` and, cut out of it, a group for each of ``rates``: the peak rate of the parameters whose names begin so.

    Where several beginnings fit a name the longest counts. What none fits comes first, at the group's own rate.
    """
    chosen = {name: max((r for r in rates if name.startswith(r)), key=len, default="") for name in group.params}
    parts = {rate: {n: p for n, p in group.params.items() if chosen[n] == rate} for rate in ("", *rates)}
    named = {rate: f"{group.name}:{rate}" if rate else group.name for rate in parts}
    return [Group(named[rate], part, rates.get(rate, group.lr), group.weight_decay) for rate, part in parts.items() if part]


class LossScale:
    """What losses are multiplied by before the backward pass of an fp16 model, so that small gradients don't vanish.

    Halved when a gradient is not finite, doubled after ``patience`` good steps in a row. ``value`` 1 stays 1.
    """

    def __init__(self, value: float = 1.0, patience: int = 200):
        self.value, self.patience, self.good = value, patience, 0

    def update(self, finite: bool) -> None:
        if self.value == 1:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 2.0)
        elif self.good == self.patience:
            self.value, self.good = min(self.value * 2, 2.0**24), 0


@dataclass(frozen=True)
class StepResult:
    """What one call of ``step()`` did.

    ``loss`` is the mean over ``count``, a regulariser included; ``grad_norm`` the norm of the mean gradient before
    clipping (NaN when the step was skipped before it was known); ``lr`` the rate of the first group at this step.
    ``unreached``: the parameters that no rank has a gradient for.
    """

    applied: bool
    reason: str | None
    loss: float
    grad_norm: float
    lr: float
    count: float
    unreached: tuple[str, ...] = ()


def regularised(loss: Sums, extra: Sums | None) -> Sums:
    """A loss whose mean is larger by the mean of ``extra``, both as (sum, count): (s + c s'/c', c) = c (s/c + s'/c').

    A regulariser thus keeps its weight whatever the size of a batch and however many are accumulated; of several
    micro-batches it counts each as much as the loss does. Nothing is added by None or a count of 0.
    """
    if extra is None or float(extra[1]) == 0:
        return loss
    return loss[0] + extra[0] * (float(loss[1]) / float(extra[1])), loss[1]
