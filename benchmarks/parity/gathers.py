"""How many bytes of weights DeepSpeed assembles by all-gather, counted where its collectives leave for torch."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mitrain.training.engine.zero import join


@dataclass
class Gathered:
    """``bytes`` of all outputs so far: what this rank held whole for a while. ``calls``: collectives."""

    bytes: int = 0
    calls: int = 0

    def add(self, outputs: Sequence[Tensor], part: Tensor) -> None:
        whole = sum(t.numel() * t.element_size() for t in outputs)
        if whole > part.numel() * part.element_size():  # a group of one gathers nothing
            self.bytes += whole
            self.calls += 1


@contextmanager
def counted_gathers() -> Iterator[Gathered]:
    """Inside, every all-gather of DeepSpeed is counted: of sharded weights in forward and backward (stage 3), and of
    updated weights after a step (stages 1 and 2). What ``mitrain.core.dist`` exchanges is not."""
    join()
    backend, counts = sys.modules["deepspeed.comm.comm"].cdb, Gathered()
    into, listed = backend.all_gather_into_tensor, backend.all_gather

    def gather_into(output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.add([output_tensor], input_tensor)
        return into(output_tensor, input_tensor, *args, **kwargs)

    def gather_list(tensor_list: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.add(tensor_list, tensor)
        return listed(tensor_list, tensor, *args, **kwargs)

    with replaced(backend, all_gather_into_tensor=gather_into, all_gather=gather_list):
        yield counts


@contextmanager
def replaced(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``owner`` has these methods of its own in place of its class's."""
    for name, method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(owner, name)
