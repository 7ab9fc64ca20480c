"""Scratch memory of the CPU backend, kept between calls.

A fresh tensor of some megabytes costs a page fault per 4 KiB, which at short lengths is more than the arithmetic on it.
What lies here is only ever used inside one forward or backward call.
"""

import threading

import torch
from torch import Tensor

MOST_BYTES = 1 << 28
"""Of one buffer that is kept; a larger one is allocated anew each time."""


class Workspace(threading.local):
    """One buffer per slot and type for each thread, as large as the largest that was asked for."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, slot: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised contiguous CPU tensor of ``shape`` in ``like``'s type; the slot's former content is lost."""
        size = torch.Size(shape).numel()
        if size * like.element_size() > MOST_BYTES:
            return like.new_empty(shape)
        key = (slot, like.dtype)
        if key not in self.buffers or self.buffers[key].numel() < size:
            with torch.inference_mode(False):
                self.buffers[key] = torch.empty(size, dtype=like.dtype)
        return self.buffers[key][:size].view(shape)


workspace = Workspace()
