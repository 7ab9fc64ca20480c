"""What scoring val holds: nothing for a backward pass, but ``train.eval_batch`` samples at once, all their candidates, and
what generating text takes.

Shapes: B samples, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from mitrain.core.errors import ModelError
from mitrain.tasks.base import Task
from mitrain.tasks.generation import generated
from mitrain.training.build import Model
from mitrain.training.plan.batch import batch_of
from mitrain.training.plan.tracing import Meter, passed

FEW, SEVERAL = 2, 4
"""Tokens said, after which what is held is compared: a cache grows by as much with each one."""


class Said(Exception):
    """As many tokens have been said as are asked for."""


class Numbers(TorchFunctionMode):
    """Inside, tensors without storage are zeros to numpy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return np.zeros(args[0].shape) if func is Tensor.numpy else func(*args, **(kwargs or {}))


@contextmanager
def silent(task: Task, begins: bool) -> Iterator[None]:
    """Inside, ``task`` predicts without saying anything; ``begins``: with prompts read once, which it is not tried for."""
    if not task.speaks:
        yield
        return
    task.spoken, task.begins = lambda samples, inputs: [("", True)] * len(samples), begins
    try:
        yield
    finally:
        del task.spoken, task.begins


def scoring(model: Model, samples: Sequence[Any], mode: FakeTensorMode) -> int:
    """The most bytes beside the weights while ``samples`` are scored, but for what is generated."""
    model.train(False)
    batch = batch_of(model, samples, mode)

    def counted(begins: bool) -> int:
        with Numbers(), silent(model.task, begins):
            return passed(model, lambda _: model.task.predict(batch), mode)

    if getattr(model.task, "could_begin", False):
        with suppress(ModelError):  # of a method that does not go on from a KV cache
            return counted(True)
    return counted(False)


def generating(model: Model, samples: Sequence[Any], mode: FakeTensorMode) -> int:
    """The same while the model says something of ``samples``: where it reads the prompts, or where the texts are longest.

    A few tokens behind prompts of a single one tell what each token's keys and values take; a cache that is written anew
    holds one layer's twice.
    """
    model.train(False)
    task, text = model.task, model.text
    asked = list({(*s.inputs.items(), task.pair(s)[0]): s for s in samples}.values())  # a picture is described once
    batch = batch_of(model, asked, mode)
    prompts = [ids for s in asked for ids in [task.prompt_ids(task.pair(s)[0])] * task.config.beams]  # each is a row
    tokens, peaks = task.config.max_new_tokens, []

    def say(rows: list[list[int]], count: int, meter: Meter) -> None:
        def noted(_: Tensor, logits: Tensor) -> Tensor:
            peaks.append(meter.peak)
            if len(peaks) == count:
                raise Said
            return logits

        peaks.clear()
        ids, mask = text.pad(rows, side="left")
        with suppress(Said), task.parts.adapter.conditioned(batch.inputs, copies=task.config.beams):
            generated(task.parts, ids, mask, logits_processor=[noted], max_new_tokens=count + 1)

    read = passed(model, partial(say, prompts, 1), mode)
    passed(model, partial(say, [row[:1] for row in prompts], SEVERAL), mode)
    each = (peaks[SEVERAL - 1] - peaks[FEW - 1]) / (SEVERAL - FEW)
    said = peaks[SEVERAL - 1] + each * max(0, max(map(len, prompts)) + tokens - 1 - SEVERAL)
    return max(read, round(said))
