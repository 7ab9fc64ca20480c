"""Standardisation of what routers and mapper read, with statistics of the training samples."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.models.batch import moments

UNIFORM = math.sqrt(3)
"""A linear map as torch starts it (uniform within ±1/√c) gives outputs of standard deviation 1/√3 of standardised inputs."""


class Standard(nn.Module):
    """x (B, c) → (x − mean) / std per dimension; the identity until `fit`. Its statistics are saved with the adapter."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, **factory: Any):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, **factory))
        self.register_buffer("scale", torch.ones(width, **factory))
        self._seen: list[Tensor] | None = None

    def watch(self) -> None:
        """Keep what passes from now on, until `fit`."""
        self._seen = []

    def see(self, values: Tensor) -> None:
        """Note rows (B, c) while watching."""
        if self._seen is not None:
            self._seen.append(values.detach())

    def fit(self) -> None:
        """Take the statistics of what was seen; a constant dimension keeps its scale."""
        seen, self._seen = self._seen, None
        if seen:
            for buffer, value in zip((self.mean, self.scale), moments(seen), strict=True):
                buffer.copy_(value)

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) * self.scale


def router_gain(temperature: float) -> float:
    """What standardised inputs of a router are multiplied by, so that its scores / τ start with a spread of about 1."""
    return UNIFORM * temperature
