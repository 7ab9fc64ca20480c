"""Which states that leave the layers are read afterwards: for the others a top layer need not compute what no other token
needs.

Shapes: B texts, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

READ: ContextVar[Tensor | None] = ContextVar("read", default=None)
"""(B, T) bool, of the pass that this thread is about to make; None where all may be read."""


@contextmanager
def only_read(ids: Tensor, places: tuple[Any, Any]) -> Iterator[None]:
    """Inside, of a pass over ``ids`` (B, T) what leaves the layers is read at ``places`` alone, (rows, positions)."""
    read = torch.zeros_like(ids, dtype=torch.bool)
    read[places] = True
    token = READ.set(read)
    try:
        yield
    finally:
        READ.reset(token)
