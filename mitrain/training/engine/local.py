"""The engine in plain torch: one process, or several that each hold all weights."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from mitrain.core import dist
from mitrain.core.errors import CheckpointError, ModelError
from mitrain.training.engine.base import Group, LossScale, OptimizerConfig, StepResult, T

SLOTS = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "adam": {"exp_avg", "exp_avg_sq", "step"}, "sgd": {"momentum_buffer"}}
MOST_STEPS = 1 << 53
SAME = "resume with the same model and configuration"
OTHER = "take another checkpoint"


class LocalEngine:
    """What the trainer needs, in plain torch. ``steps`` counts calls of ``step()``, ``applied`` those that changed weights.

    On several ranks each gives ``backward`` its own part of the step; ``step`` sums losses, counts and gradients over
    all of them, so that every rank applies the same update, or none does. A rank may have no samples.

    ``schedule`` maps the step number (from 0, skipped steps included, so that the rate follows the data) to the
    multiplier of every group's ``lr``. ``scale``: the loss scale to begin with, 1 for none. Frozen, repeated or missing
    parameters raise ModelError.
    """

    lockstep = False
    """Whether all ranks must run the same modules equally often: their weights lie on all of them."""

    def __init__(
        self,
        groups: Iterable[Group],
        schedule: Callable[[int], float],
        config: OptimizerConfig | None = None,
        scale: float = 1.0,
    ):
        self.groups = [group for group in groups if group.params]
        self.params = collect(self.groups)
        self.schedule = schedule
        self.config = config or OptimizerConfig()
        self.optimizer = make_optimizer(self.config, self.groups)
        self.scale = LossScale(scale)
        self.steps = 0
        self.applied = 0
        self._clear()

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._losses: list[Tensor] = []
        self._count = 0.0

    def forward(self, compute: Callable[[], T]) -> T:
        """``compute()``, one forward pass of the whole model."""
        return compute()

    def apart(self) -> AbstractContextManager:
        """What runs inside is no part of a step."""
        return nullcontext()

    def gathered(self, write: bool = False) -> AbstractContextManager:
        """Inside, the trainable parameters can be read, and with ``write`` written to, on all ranks alike."""
        return nullcontext()  # the parameters are the optimizer's own

    def backward(self, loss_sum: Tensor, count: float | Tensor) -> None:
        """Accumulate the gradients of ``loss_sum`` (a scalar) over ``count`` samples; an empty one is ignored."""
        count = checked_count(count)
        if count == 0:
            return
        (loss_sum * self.scale.value if self.scale.value != 1 else loss_sum).backward()
        # As tensors: float() would wait for the GPU after every micro-batch.
        self._losses.append(loss_sum.detach())
        self._count += count

    def step(self) -> StepResult:
        """Finish the step and clear the gradients, whether or not the update was applied."""
        multiplier = self.schedule(self.steps)
        for options, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            options["lr"] = group.lr * multiplier
        total, count, reached = self._totals()
        loss = total / count if count else math.nan
        norm, reason = math.nan, None
        if count == 0:
            reason = "no samples"
        elif not math.isfinite(loss):
            reason = "non-finite loss"
        else:
            norm = self._update(count * self.scale.value, reached)
            reason = None if math.isfinite(norm) else "non-finite gradient"
            # Not after a non-finite loss: the scale is applied to its gradient alone, so a smaller one would not help.
            self.scale.update(reason is None)
        if reason is not None:
            self._discard()
        self.applied += reason is None
        has_gradient = set(map(id, reached))
        unreached = tuple(name for name, param in self.params.items() if id(param) not in has_gradient)
        result = StepResult(reason is None, reason, loss, norm, self.optimizer.param_groups[0]["lr"], count, unreached)
        self._clear()
        self.steps += 1
        return result

    def _update(self, count: float, reached: list[nn.Parameter]) -> float:
        """Change the weights by the gradient / ``count`` unless it is not finite; its norm, finite on all ranks or none."""
        norm = self._mean_and_clip(count, reached)
        # All ranks or none: one that skipped alone would train other weights from here on.
        if dist.any_rank(not math.isfinite(norm)):
            return norm if not math.isfinite(norm) else math.nan
        self.optimizer.step()
        return norm

    def discard(self) -> None:
        """Forget the micro-batches since the last step; nothing but the next gathers is done otherwise than before."""
        self._discard()
        self._clear()

    def _discard(self) -> None:
        """Forget the gradients of a step that is not applied; ``_clear`` does."""

    def _totals(self) -> tuple[float, float, list[nn.Parameter]]:
        """The summed loss and the count of the step, and the parameters it has gradients for, over all ranks."""
        own = [sum(map(float, self._losses)), self._count, *(p.grad is not None for p in self.params.values())]
        loss, count, *reached = dist.sum_across(torch.tensor(own, dtype=torch.float64)).tolist()
        return loss, count, [p for p, ranks in zip(self.params.values(), reached, strict=True) if ranks]

    def _mean_and_clip(self, count: float, params: list[nn.Parameter]) -> float:
        """Turn summed gradients into clipped means, in place; the norm of the means before clipping."""
        if not params:
            return 0.0
        grads = sum_gradients(params)
        torch._foreach_div_(grads, count)
        norm = get_total_norm(grads)
        if self.config.clip is None:
            pass
        elif self.config.clip_by == "norm":
            clip_grads_with_norm_(params, self.config.clip, norm)
        else:
            clip_grad_value_(params, self.config.clip)
        return float(norm)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer state as flat named tensors and a JSON-able dict, free of ranks and indices; all ranks together.

        Tensors are named SLOT.PARAMETER, as ``exp_avg.layers.3.gate``; a parameter never stepped has none.
        """
        tensors = {
            f"{slot}.{name}": value.detach()
            for name, param in self.params.items()
            for slot, value in self._slots(param).items()
            if isinstance(value, Tensor)
        }
        return tensors, self._counters()

    def _slots(self, param: nn.Parameter) -> Mapping[str, Any]:
        """The optimizer's state of one parameter, whole."""
        return self.optimizer.state.get(param, {})

    def _counters(self) -> dict[str, Any]:
        return {
            "optimizer": self.config.name,
            "steps": self.steps,
            "applied": self.applied,
            "loss_scale": [self.scale.value, self.scale.good],
            "groups": {group.name: sorted(group.params) for group in self.groups},
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; CheckpointError when it belongs to other parameters."""
        own = self._counters()
        if not isinstance(state, Mapping):
            raise CheckpointError(f"the saved engine state is a {type(state).__name__}: {OTHER}")
        for key in ("optimizer", "groups"):
            if state.get(key) != own[key]:
                differs = difference(state.get(key), own[key])
                raise CheckpointError(f"the saved {key} {differs}: {SAME}")
        for key in ("steps", "applied"):
            if type(state.get(key)) is not int or not 0 <= state[key] < MOST_STEPS:
                raise CheckpointError(f"the saved engine state has {key}={repr(state.get(key))[:40]}: {OTHER}")
        saved = state.get("loss_scale", [1.0, 0])
        plain = isinstance(saved, list) and [type(x) for x in saved] == [float, int]
        if not plain or not 1 <= saved[0] <= 2**24 or not 0 <= saved[1] <= self.scale.patience:
            raise CheckpointError(f"the saved engine state has loss_scale={repr(saved)[:40]}: {OTHER}")
        if self.scale.value != 1 and saved[0] != 1:
            self.scale.value, self.scale.good = saved
        self._take_slots(self._sort_slots(tensors))
        self.steps, self.applied = state["steps"], state["applied"]
        self._clear()

    def _take_slots(self, slots: Mapping[str, dict[str, Tensor]]) -> None:
        packed = self.optimizer.state_dict()
        packed["state"] = {i: slots[name] for i, name in enumerate(self.params) if name in slots}
        self.optimizer.load_state_dict(packed)

    def _sort_slots(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """{parameter: {slot: tensor}}, complete and of the right shapes, or CheckpointError."""
        expected = SLOTS[self.config.name]
        sorted_slots: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            slot, _, name = key.partition(".")
            if slot not in expected or name not in self.params:
                raise CheckpointError(f"the saved optimizer state {key!r} belongs to no parameter here: {SAME}")
            if not tensor.is_floating_point():
                raise CheckpointError(f"the saved optimizer state {key!r} is of {tensor.dtype}: {OTHER}")
            param = self.params[name]
            # ZeRO-3 leaves an empty tensor behind where the parameter is not gathered; its whole shape stays beside it.
            shape = torch.Size() if slot == "step" else getattr(param, "ds_shape", param.shape)
            if tensor.shape != shape:
                sizes = f"shape {list(tensor.shape)}, here {list(shape)}"
                raise CheckpointError(f"the saved optimizer state {key!r} has {sizes}: {SAME}")
            sorted_slots.setdefault(name, {})[slot] = tensor.clone()
        for name, slots in sorted_slots.items():
            if set(slots) != expected:
                raise CheckpointError(f"the saved state of {name!r} lacks {sorted(expected - set(slots))}: {OTHER}")
        return sorted_slots


def checked_count(count: float | Tensor) -> float:
    count = float(count)
    if not 0 <= count < math.inf:
        raise ValueError(f"the count of a loss must be finite and not negative, not {count}")
    return count


def collect(groups: list[Group]) -> dict[str, nn.Parameter]:
    """All parameters by name, each trainable and in one group only."""
    params: dict[str, nn.Parameter] = {}
    seen: dict[int, str] = {}
    for group in groups:
        for name, param in group.params.items():
            if not param.requires_grad:
                raise ModelError(f"{name!r} in group {group.name!r} is frozen: give the engine trainable ones only")
            if name in params or id(param) in seen:
                first = seen.get(id(param), name)
                raise ModelError(f"{name!r} in group {group.name!r} was already given as {first!r}: give it once")
            params[name], seen[id(param)] = param, name
    if not params:
        raise ModelError("there is nothing to train: every parameter is frozen or the groups are empty")
    return params


def sum_gradients(params: list[nn.Parameter]) -> list[Tensor]:
    """The gradients of ``params``, summed over all ranks in one flat buffer; none at all counts as zero."""
    if dist.world() == 1:
        return [p.grad for p in params]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grads = [p.grad for p in params]
    dtype = reduce(torch.promote_types, (g.dtype for g in grads), torch.float32)
    flat = dist.sum_across(torch.cat([g.to(dtype).flatten() for g in grads]))
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))
    return grads


def make_optimizer(config: OptimizerConfig, groups: list[Group]) -> torch.optim.Optimizer:
    """torch's own optimizers, fused: AdamW of 10 M parameters takes 16 ms on one CPU core, 80 to 120 ms otherwise."""
    options = [{"params": list(g.params.values()), "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    if config.name == "sgd":
        return torch.optim.SGD(options, momentum=config.momentum, fused=True)
    adam = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
    return adam(options, betas=config.betas, eps=config.eps, fused=True)


def difference(saved: Any, own: Any) -> str:
    """'is X, here Y', shortened to the first thing that differs."""
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in sorted(saved.keys() | own.keys()):
            if saved.get(key) != own.get(key):
                return f"differ in {key!r}: " + difference(saved.get(key), own.get(key))
    if isinstance(saved, list) and isinstance(own, list):
        extra, lost = [n for n in saved if n not in own], [n for n in own if n not in saved]
        return f"has {len(saved)} entries, here {len(own)} (only saved: {extra[:3]}, only here: {lost[:3]})"
    return f"is {str(saved)[:80]}, here {str(own)[:80]}"
