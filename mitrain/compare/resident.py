"""Bytes of frozen weights and of optimizer states that a rank holds, counted by storages.

Not by resident memory: a C library keeps freed buffers. Every tensor that a frozen parameter, its module or its
quantisation state refers to is followed to its storage, and each storage counts once and whole: a shard, a copy that is
still gathered, and copies that a library keeps beside the parameter.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

STATES = ("state", "quant_state", "state2")
"""Attributes in which bitsandbytes' modules and parameters keep tensors of their own."""


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """{address: bytes} of what ``tensors`` lie in; empty ones lie nowhere."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and not tensor.is_meta:
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def attached(owner: Any) -> Iterator[Tensor]:
    """Tensors among ``owner``'s attributes and in its quantisation states; gradients are none of it."""
    for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
        if isinstance(value, Tensor):
            yield value
        elif name in STATES and value is not None:
            yield from attached(value)


def frozen_parameters(parts: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    parameters = {id(p): p for part in parts.values() for p in part.parameters() if not p.requires_grad}
    return list(parameters.values())


def frozen_tensors(parts: Mapping[str, nn.Module]) -> Iterator[Tensor]:
    """All that holds frozen weights on this rank. Trainable parameters and their shards are left out."""
    for parameter in frozen_parameters(parts):
        yield parameter.data
        yield from (t for t in attached(parameter) if t is not parameter.grad)
    for part in parts.values():
        for module in part.modules():
            yield from (b for b in module._buffers.values() if b is not None)
            yield from (t for t in attached(module) if not t.requires_grad)


def optimizer_bytes(optimizer: torch.optim.Optimizer, trained: Iterable[Tensor]) -> int:
    """An optimizer's states on this rank, and the copies of weights that it updates in place of ``trained``."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    updated = [p.data for group in optimizer.param_groups for p in group["params"]]
    own = storages(p.data for p in trained)
    return sum(size for key, size in storages([*states, *updated]).items() if key not in own)
