"""Which implementation the operators of mitrain_kernels run on, and how they are counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from mitrain_kernels.infused_swiglu import op as swiglu
from torch import Tensor

from mitrain.core.config import Section

Backend = Literal["auto", "reference", "sdpa", "flash", "flex", "triton"]


class KernelConfig(Section):
    """``backend`` of infused attention; 'auto' picks by device, length and mask, and logs why.

    The feed-forward's operator follows where it has that backend ('reference', 'triton'), else it picks its own.
    """

    backend: Backend = "auto"


def feed_forward_backend(backend: str) -> str:
    """The backend of ``infused_swiglu`` that goes with one of ``infused_attention``."""
    return backend if backend in ("reference", "triton") else "auto"


@contextmanager
def one_block_of_each_size(comes: Callable[[int], object]) -> Iterator[None]:
    """Inside, infused SwiGLU on a CPU, which works block by block, runs at most two blocks of tokens of each size: for what
    only counts its operators. Of a batch of LLaMA-2-7B there are hundreds in every layer.

    The first of a size begins without what one before it leaves; the second stands for all others, which make the same
    tensors: ``comes`` is told of how many.
    """

    def few(gate: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[swiglu.Place, slice | int]]:
        alike: dict[tuple[int, ...], list[tuple[swiglu.Place, slice | int]]] = {}
        for where, whose in every(gate, cu_seqlens):
            places = where if isinstance(where, tuple) else (where,)
            size = (len(range(n)[place]) for n, place in zip(gate.shape, places, strict=False))
            alike.setdefault(tuple(size), []).append((where, whose))
        for first, *others in alike.values():
            yield first
            if others:
                comes(len(others))
                yield others[0]
                comes(1)

    every, swiglu.blocks = swiglu.blocks, few
    try:
        yield
    finally:
        swiglu.blocks = every
