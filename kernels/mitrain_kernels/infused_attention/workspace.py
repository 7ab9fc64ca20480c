"""Scratch memory of the CPU backend, kept between calls.

A fresh tensor of some megabytes costs a page fault per 4 KiB, which at short lengths is more than the arithmetic on it.
What lies here is only ever used inside one forward or backward call.
"""

import threading

import torch
from torch import Tensor

MOST_BYTES = 1 << 28
"""Of one buffer that is kept; a larger one is allocated anew each time."""
MOST_VIEWS = 512


class Workspace(threading.local):
    """One buffer per slot and type for each thread, as large as the largest that was asked for."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def take(self, slot: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised contiguous CPU tensor of ``shape``; the slot's former content is lost."""
        found = self.views.get((slot, dtype, shape))
        return self.make(slot, dtype, tuple(shape)) if found is None else found

    def make(self, slot: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        if size * dtype.itemsize > MOST_BYTES:
            return torch.empty(shape, dtype=dtype)
        buffer = self.buffers.get((slot, dtype))
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < size:
                self.views = {key: x for key, x in self.views.items() if key[:2] != (slot, dtype)}
                buffer = self.buffers[slot, dtype] = torch.empty(size, dtype=dtype)
            if len(self.views) >= MOST_VIEWS:
                self.views.clear()
            view = self.views[slot, dtype, shape] = buffer[:size].view(shape)
        return view


workspace = Workspace()
