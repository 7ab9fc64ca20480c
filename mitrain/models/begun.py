"""Texts that a causal language model has begun to read: what it keeps of them, and how it goes on.

Shapes: B texts, L tokens read, T tokens behind them.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


@dataclass(frozen=True)
class Begun:
    """Texts that go on from what the model has read: its KV ``cache`` of that, and the ``mask`` (B, L), left-padded."""

    cache: Cache | None
    mask: Tensor

    @property
    def bytes(self) -> int:
        """Of the cache's keys and values."""
        held = [getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values")]
        return sum(x.nbytes for x in held if x is not None)

    def rows(self, index: Tensor) -> "Begun":
        """The texts ``index``, repeatedly where they are there several times."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # which then hold tensors of their own
        cache.batch_select_indices(index)
        return Begun(cache, self.mask[index])

    def goes_on(self, mask: Tensor) -> dict[str, Any]:
        """What a pass over the tokens behind, (B, T) with their ``mask``, is told."""
        whole = torch.cat([self.mask, mask], 1)
        return {
            "past_key_values": self.cache,
            "use_cache": True,
            "attention_mask": whole,
            "position_ids": places_of(whole)[:, -mask.shape[1] :],
        }


def places_of(mask: Tensor) -> Tensor:
    """(B, T): the position of each token among those that ``mask`` (B, T) shows."""
    return (mask.cumsum(1) - 1).clamp_min(0)
