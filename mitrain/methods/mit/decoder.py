"""Where a decoder can be infused: its layers, their attention and their last feed-forward projection.

What cannot be served is refused here, in one line,
before anything is touched.
"""

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mitrain.core.errors import ModelError
from mitrain.models import layouts


@dataclass(frozen=True)
class LayerShape:
    """Widths that the maps into one layer need: ``heads`` H × ``head_dim`` d (not the hidden size), ``ffn`` d_ff."""

    heads: int
    head_dim: int
    ffn: int


@dataclass(frozen=True)
class InfusionPoint:
    """One layer: its attention module and the projection whose input is the feed-forward activation."""

    index: int
    attention: nn.Module
    projection: nn.Module | None
    shape: LayerShape


@dataclass(frozen=True)
class Decoder:
    """The stack of layers inside a language model."""

    model: PreTrainedModel
    layers: nn.ModuleList

    @property
    def name(self) -> str:
        return type(self.model).__name__


def find_decoder(model: PreTrainedModel) -> Decoder:
    """The text decoder of ``model``; ModelError when there is none that attention hooks can reach."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"cannot attach to {type(model).__name__}: give a Hugging Face model (PreTrainedModel)")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder: only decoder-only language models are infused")
    decoder = model.get_decoder()
    return Decoder(decoder, layouts.layers_of(decoder))


def infusion_point(decoder: Decoder, index: int, ffn: bool) -> InfusionPoint:
    """Attention, last projection and widths of layer ``index``; ModelError for shapes that MiT does not fit."""
    layer, where = decoder.layers[index], f"layer {index} of {decoder.name}"
    attention = layouts.attention_of(layer)
    if attention is None:
        raise ModelError(f"{where} has no softmax attention ({', '.join(layouts.ATTENTIONS)}): choose other layers")
    if getattr(attention, "sinks", None) is not None:
        raise ModelError(f"{where} uses attention sinks, under which infusion does not fold: not supported")
    parameters = inspect.signature(attention.forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        raise ModelError(f"{where} does not use Hugging Face's attention interface: update transformers or the model")
    config = decoder.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    head_dim = head_dim or config.hidden_size // heads
    if getattr(attention, "v_head_dim", head_dim) != head_dim:
        raise ModelError(f"{where} has keys and values of different widths (latent attention): not supported")
    projection = last_projection(layer, where) if ffn else None
    width = projection_width(projection) if projection is not None else 0
    return InfusionPoint(index, attention, projection, LayerShape(heads, head_dim, width))


def last_projection(layer: nn.Module, where: str) -> nn.Module:
    """The projection that the feed-forward activation enters."""
    for _, block in layouts.feed_forward_blocks(layer):
        if any(hasattr(block, name) for name in ("experts", "router")):
            raise ModelError(f"{where} has a mixture-of-experts feed-forward: set adapter.ffn=false")
        for name in layouts.LAST:
            projection = getattr(block, name, None)
            if projection is not None and projection_width(projection):
                return projection
    raise ModelError(
        f"{where} has no last feed-forward projection by a known name ({', '.join(layouts.LAST)}): set adapter.ffn=false"
    )


def projection_width(projection: nn.Module) -> int:
    """Input width of a linear layer, quantised ones and GPT-2's transposed kind included; 0 for anything else."""
    if isinstance(projection, Conv1D):
        return projection.weight.shape[0]
    return int(getattr(projection, "in_features", 0))
