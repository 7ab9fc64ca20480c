"""Which implementation the operators of mitrain_kernels run on."""

from typing import Literal

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
