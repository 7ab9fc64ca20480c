"""Before the first step: room on the disk for the run's checkpoints, and in memory for its largest micro-batch.

A run that cannot end then says so in its first minute, with what it needs, and not after hours.
"""

import logging
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.core import dist, memory
from mitrain.core.errors import CheckpointError, UserError, is_out_of_memory
from mitrain.data.loader import Draw
from mitrain.data.sources import limit
from mitrain.models import loading
from mitrain.training import checkpoint
from mitrain.training.plan.batch import LOOKED_AT
from mitrain.training.telemetry import memory_bytes

log = logging.getLogger(__name__)

WORTH = 100
"""Micro-batches of a run for which ``auto`` tries the largest one first: it then costs one in a hundred."""
STATES = {"adamw": 2, "adam": 2, "sgd": 1}
SHOWN = {"frozen_weights": "frozen weights", "trained_weights": "trained weights", "gradients": "their gradients"}
SHOWN |= {"optimizer": "optimizer's states", "in_use_before": "in use before the batch", "there": "memory there is"}


class OutOfMemory(UserError):
    """The largest batch does not fit; ``document`` has the bytes of the table."""

    def __init__(self, message: str, document: Mapping[str, Any]):
        super().__init__(message)
        self.document = {"out_of_memory": dict(document)}


def check(trainer: Any, step: int) -> None:
    """All ranks together, before the step after ``step``; leaves random numbers, gradients and buffers as they were."""
    dist.from_main(lambda: check_disk(trainer, step))
    train = trainer.config.train
    batches = (trainer.span.steps - step) * train.accumulate
    if train.check_largest == "auto" and batches >= WORTH and trainer.drawn is None:
        with trainer.watch.phase("try the largest batch"), untouched(trainer.model.trainable.values()):
            check_memory(trainer)


# The disk


def check_disk(trainer: Any, step: int) -> None:
    """CheckpointError where the folder's disk has less room than the checkpoints that are still to be written."""
    one, folder = checkpoint_bytes(trainer), trainer.folder
    count = checkpoints_to_come(trainer, step) - len(list((folder / "checkpoints").glob("step-*")))
    free, needed = shutil.disk_usage(folder).free, one * max(1, count)
    if free < needed:
        raise CheckpointError(
            f"the checkpoints of this run need {size(needed)} ({max(1, count)} of {size(one)}) and {folder} has"
            f" {size(free)}: make room there, lower train.keep, or give another folder (--runs, --run-dir)"
        )


def checkpoint_bytes(trainer: Any) -> int:
    """Of what is trained, buffers included, and of the optimizer's states, which are float32."""
    tensors = [t for module in trainer.model.trainable.values() for t in module.state_dict(keep_vars=True).values()]
    states = STATES[trainer.config.train.optimizer.name] * 4 * sum(elements(trainer))
    return sum(loading.elements(t) * t.element_size() for t in tensors) + states


def elements(trainer: Any) -> list[int]:
    return [loading.elements(p) for p in trainer.engine.params.values()]


def checkpoints_to_come(trainer: Any, step: int) -> int:
    """How many stand at once: those kept, the best one and the one that is being written; fewer in a short run."""
    train, span = trainer.config.train, trainer.span
    due = (s for s in range(step + 1, span.steps + 1) if span.due(train.save_every, s) or span.due(train.eval_every, s))
    return 1 + len(list(islice(due, train.keep + 1)))


# The memory


def check_memory(trainer: Any) -> None:
    """A forward and a backward pass of the longest samples; OutOfMemory, after a table, where they do not fit."""
    draws = longest(trainer)
    tokens = max(trainer.model.task.tokens([draw.sample]) for draw in draws)
    share = dist.shard_of(len(draws))
    if not trainer.quiet:  # the system may end a process that takes too much memory, and then this is its last line
        print(f"trying the largest batch: {len(draws)} samples of up to {tokens} tokens", file=sys.stderr)
    before, short = memory_bytes(), None
    trainer.model.train()
    try:
        states = states_to_come(trainer)
        trainer._accumulate(draws, share)
        trainer.engine.discard()
        del states
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        short = table(trainer, before, len(draws[share]), tokens)
    if short is not None:
        lines = [f"  {words:<24}{size(short[name]):>12}" for name, words in SHOWN.items()]
        print("\n".join([f"rank {dist.rank()} ran out of memory in the largest batch:", *lines]), file=sys.stderr)
    if short := dist.first_not_none(short):
        raise OutOfMemory(
            f"out of memory in the largest batch ({short['samples']} samples of up to {short['tokens']} tokens on a"
            " rank), which was tried before the first step: lower train.batch and raise train.accumulate, set"
            " train.checkpoint_activations=true, model.quantize=int8 or zero.stage, or shorten the texts;"
            " train.check_largest=off leaves it to the steps",
            short,
        )


def states_to_come(trainer: Any) -> Tensor | None:
    """Room for the optimizer's states: torch makes them in the first step, beside them the second one's batch must fit."""
    if trainer.engine.optimizer.state:
        return None
    first = next(iter(trainer.engine.params.values()))
    return torch.empty(STATES[trainer.config.train.optimizer.name] * sum(elements(trainer)), device=first.device)


def longest(trainer: Any) -> list[Draw[Any]]:
    """The micro-batch of the samples with the most tokens, dealt out so that every rank has some of the longest."""
    samples, batch, world = limit(trainer.train, LOOKED_AT), trainer.config.train.batch, dist.world()
    ordered = sorted(samples, key=lambda sample: trainer.model.task.tokens([sample]), reverse=True)
    most = list(islice(cycle(ordered), batch))
    dealt = [sample for rank in range(world) for sample in most[rank::world]]
    return [Draw(sample, 0, Random(i)) for i, sample in enumerate(dealt)]


@contextmanager
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Random generators and the modules' buffers are afterwards what they were before."""
    random = checkpoint.rng_state()
    kept = [
        (owner, name, b, b.clone())
        for m in modules
        for owner in m.modules()
        for name, b in owner._buffers.items()
        if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, content in kept:
                owner._buffers[name] = buffer.copy_(content)
        checkpoint.set_rng_state(random)


def table(trainer: Any, before: int, samples: int, tokens: int) -> dict[str, int]:
    """Bytes of this rank by what they are of, counted on the parameters."""
    frozen = {id(p): p for module in trainer.model.frozen.values() for p in module.parameters()}
    trained, stage = 4 * sum(elements(trainer)), trainer.config.zero.stage
    states = STATES[trainer.config.train.optimizer.name] * trained
    return {
        "frozen_weights": sum(held(p) for p in frozen.values()),
        "trained_weights": trained,
        "gradients": trained,
        "optimizer": states // (dist.world() if stage else 1),
        "in_use_before": before,
        "there": memory_there(),
        "samples": samples,
        "tokens": tokens,
    }


def held(parameter: Tensor) -> int:
    """Bytes of the parameter on this rank, or of its shard; of one that was let go of next to none."""
    own = getattr(parameter, "ds_tensor", parameter)
    return min(own.nbytes, own.untyped_storage().nbytes())


def memory_there() -> int:
    """Bytes of this GPU, or of what the machine, its control group and the process's limit leave, the least of them."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    bound = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(memory.there(), bound if bound != resource.RLIM_INFINITY else sys.maxsize)


def size(count: float) -> str:
    """Bytes in the unit that leaves three digits before the point at most."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, "TB" if unit == "GB" else unit
    return f"{count:.3g} {unit}"
