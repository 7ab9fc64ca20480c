"""Activation checkpointing of single layers: their activations are computed again in the backward pass.

Not transformers' ``gradient_checkpointing_enable``: that makes the embeddings require gradients, which ends the
frozen trunk below the first infused layer, and does nothing for layers in eval mode, as frozen ones are.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Remember = Callable[[], Callable[[], AbstractContextManager]]


class CheckpointedLayer(nn.Module):
    """A layer that saves only its inputs for backward; attributes of the layer itself can be read through it.

    ``remember()`` is called in the forward pass and returns a context for the recomputation, which restores what the
    layer's hooks read from outside (the features bound at the time, long unbound when backward runs).
    """

    def __init__(self, layer: nn.Module, remember: Remember):
        super().__init__()
        self.layer = layer
        self._remember = remember

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.layer(*args, **kwargs)
        remembered = self._remember()

        def run(*args: Any) -> Any:
            with remembered():
                return self.layer(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)
