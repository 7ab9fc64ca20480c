"""The frozen trunk: every layer of a language model or encoder below the first one that an adapter changes.

Nothing trainable lies under it, so it is a frozen function of the text (or picture) alone. `trunk_states` computes what
leaves it, once for each; `replay` runs the rest of the model on that, without a copied forward pass: for the time of one
call the trunk's layers are stood in for by modules that hand the given states on.

Shapes: B batch, T tokens, D hidden width.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.errors import ModelError
from mitrain.models.batch import TextBatch
from mitrain.models.layouts import layer_owner
from mitrain.models.loading import agree

log = logging.getLogger(__name__)


class StandIn(nn.Module):
    """Takes a frozen layer's place: returns ``states`` if it has them, else its input. Other attributes are the layer's."""

    def __init__(self, layer: nn.Module, states: Tensor | None):
        super().__init__()
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_states", states)

    def __getattr__(self, name: str):
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states if self._states is None else self._states


@contextlib.contextmanager
def replay(model: PreTrainedModel, depth: int, states: Tensor) -> Iterator[None]:
    """Inside, a forward pass of ``model`` starts at layer ``depth`` with ``states`` (B, T, D).

    Call a language model with ``inputs_embeds=states``, which gives it the shape and spares the embedding look-up.
    """
    owner, name = layer_owner(model)
    layers = getattr(owner, name)
    below = [StandIn(layer, states if i == 0 else None) for i, layer in enumerate(layers[:depth])]
    setattr(owner, name, nn.ModuleList([*below, *layers[depth:]]))
    enter = None if depth else layers[0].register_forward_pre_hook(lambda _, args: (states, *args[1:]))
    try:
        yield
    finally:
        setattr(owner, name, layers)
        if enter is not None:
            enter.remove()


class Top(StandIn):
    """Stands at the trunk's top, runs the layer whose place it takes where ``runs``, and keeps what leaves it."""

    def __init__(self, layer: nn.Module, runs: bool):
        super().__init__(layer, None)
        object.__setattr__(self, "_runs", runs)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        out = self._layer(hidden_states, *args, **kwargs) if self._runs else hidden_states
        object.__setattr__(self, "_states", out)
        return out


@torch.no_grad()
def trunk_states(model: PreTrainedModel, depth: int, **inputs: Any) -> Tensor:
    """What leaves the ``depth`` bottom layers: (B, T, D), in the model's dtype.

    ``depth == 0`` gives what enters the first layer, ``depth == number of layers`` what enters the final norm.
    ``inputs``: what ``model.base_model`` takes: input_ids and attention_mask, or pixel_values, or input_features.
    Of an encoder of several stages, as Swin, ``depth`` is 0 or the number of stages.
    """
    if hasattr(model.config, "depths"):
        return staged_states(model.base_model, depth, inputs["pixel_values"])
    owner, name = layer_owner(model)
    layers = getattr(owner, name)
    last = max(depth - 1, 0)
    top = Top(layers[last], runs=depth > 0)
    above = [StandIn(layer, None) for layer in layers[last + 1 :]]
    setattr(owner, name, nn.ModuleList([*layers[:last], top, *above]))
    options = {"use_cache": False} if "input_ids" in inputs else {}
    try:
        model.base_model(**{**options, **inputs})
    finally:
        setattr(owner, name, layers)
    return top._states


def staged_states(model: PreTrainedModel, depth: int, pixels: Tensor) -> Tensor:
    """(B, N, D): what enters the first stage, or what leaves the last, of ``pixels`` (B, 3, height, width)."""
    states, grid = model.embeddings(pixels)
    if depth not in (0, len(model.encoder.layers)):
        raise ModelError(
            f"the states inside {type(model).__name__} at depth {depth} are not kept: take 0 or {len(model.encoder.layers)}"
        )
    return model.encoder(states, grid).last_hidden_state if depth else states


def last_hidden(model: PreTrainedModel, texts: TextBatch) -> Tensor:
    """(B, T, D): a language model's hidden states after its final norm, run from the bottom or from ``texts.states``."""
    if texts.states is None:
        return model.base_model(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False).last_hidden_state
    with replay(model, texts.depth, texts.states):
        outputs = model.base_model(inputs_embeds=texts.states, attention_mask=texts.mask, use_cache=False)
    return outputs.last_hidden_state


@torch.no_grad()
def reproduces(model: PreTrainedModel, depth: int, ids: Tensor, mask: Tensor) -> bool:
    """Whether `replay` of what leaves the ``depth`` bottom layers gives what the whole model gives for ``ids`` (B, T).

    It does not where the layers above read more than that: embeddings of their own, several streams, projections before
    the first layer. What is asked is the model, by running it both ways.
    """
    expected = last_hidden(model, TextBatch(ids, mask))
    shown = mask[..., None].to(expected.dtype)
    try:
        states = trunk_states(model, depth, input_ids=ids, attention_mask=mask) * shown
        hidden = last_hidden(model, TextBatch(ids, mask, states, depth))
    except Exception as error:  # a model that cannot be replayed fails in a way of its own
        log.debug("%s is not replayed: %r", type(model).__name__, error)
        return False
    return states.shape[:2] == ids.shape and agree(hidden * shown, expected * shown)
