"""Parameters, bytes and operations of a trained model: counted on its tensors, not read off the process.

peak_bytes   weights + gradients + optimizer state + saved_bytes
    weights      storages of all parameters and buffers, frozen ones included, each once
    gradients    one of its own size for each trained parameter
    optimizer    the states that the optimizer has after its last step
saved_bytes  storages that autograd keeps for the backward pass of one training step, each once, weights not counted again
flops        of one sample in a training step's forward pass: matrix products, convolutions and attention, 2 for each
             multiply-accumulate, attention over all pairs of tokens as if nothing were masked. What frozen parts compute
             once and the run keeps (features of pictures, states of texts below the first changed layer) is not in it.
"""

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mitrain.compare.resident import frozen_tensors, optimizer_bytes, storages
from mitrain.models import loading
from mitrain.tasks.base import Batch
from mitrain.training import curves
from mitrain.training.build import Model
from mitrain.training.plan.tracing import attention_flops
from mitrain.training.trainer import Trainer


class Saved:
    """Inside, counts the storages that autograd saves; those of ``weights`` are not counted."""

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = set(storages(weights))
        self._found: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._found |= {key: size for key, size in storages([tensor]).items() if key not in self._weights}
        return tensor.detach()  # shares the storage, and keeps no graph alive from within the graph

    @property
    def bytes(self) -> int:
        return sum(self._found.values())

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def parameters(model: Model) -> dict[str, Any]:
    """Counts. ``share``: of the trained parameters among all, frozen ones included."""
    trained = model.trained()
    own = {id(p) for part in (*model.trainable.values(),) for p in part.parameters()} | {id(p) for p in trained}
    frozen = {id(p): p for part in model.frozen.values() for p in part.parameters() if id(p) not in own}
    numbers = [sum(loading.elements(p) for p in group) for group in (trained, frozen.values())]
    head = sum(loading.elements(p) for p in model.task.parameters() if p.requires_grad)
    return {
        "trainable_parameters": numbers[0],
        "adapter_parameters": numbers[0] - head,
        "head_parameters": head,
        "frozen_parameters": numbers[1],
        "share": numbers[0] / sum(numbers),
    }


def weights(model: Model) -> Iterator[Tensor]:
    yield from frozen_tensors(model.frozen)
    for part in model.trainable.values():
        yield from part.parameters()
        yield from part.buffers()
    yield from model.trained()


def of_step(trainer: Trainer) -> dict[str, Any]:
    """Bytes and operations of one more training step of a run, which is not taken."""
    model, samples = trainer.model, trainer.config.train.batch
    model.train()
    draws = trainer.batches.next()
    batch = trainer.batches.of(draws)
    with Saved(weights(model)) as saved:
        loss = trainer.loss(batch)  # held: what it has saved lives as long
        kept = saved.bytes
    del loss
    trained = model.trained()
    parts = {
        "weights": sum(storages(weights(model)).values()),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimizer": optimizer_bytes(trainer.engine.optimizer, trained),
        "saved": kept,
    }
    return {
        "peak_bytes": sum(parts.values()),
        "saved_bytes": kept,
        "bytes": parts,
        "flops_per_sample": operations(trainer, batch) / len(draws),
        "batch": samples,
        **({"usage": dict(usage)} if (usage := model.adapter.usage()) else {}),
    }


def operations(trainer: Trainer, batch: Batch) -> int:
    """FLOPs of a batch's training forward pass."""
    with FlopCounterMode(display=False, custom_mapping=own_operators()) as counter:
        trainer.loss(batch)
    return counter.get_total_flops()


def own_operators() -> dict[Any, Any]:
    """What the project's operators compute, in the counter's terms: infused attention as attention, both its products."""
    operator = getattr(torch.ops.mitrain_kernels, "infused_attention", None)
    return {} if operator is None else {operator: attention_flops}


def step_ms(run: Path) -> float | None:
    """Median over the training steps that a run has logged."""
    times = [seconds for _, seconds in curves.series(curves.logged(run), "train", "seconds")]
    return round(1e3 * statistics.median(times), 2) if times else None
