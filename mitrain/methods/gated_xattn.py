"""Gated cross-attention, as Flamingo's GATED XATTN-DENSE layers (arXiv 2204.14198, section 2.2): the text asks the tokens.

Where this departs from the paper: the encoder's tokens are read as they are, without the Perceiver Resampler that makes
64 of those of several pictures, and there is one file for each text, which every token of the text sees.

Shapes: B samples, T text tokens, N tokens of the encoder, D width of the text model, c of the encoder, H heads of width d.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ModelError
from mitrain.methods.base import Attachment, Traits
from mitrain.methods.conditioned import ConditionedAdapter
from mitrain.methods.selection import LayersSetting, select_layers
from mitrain.models import layouts
from mitrain.models.batch import ModalityInputs
from mitrain.models.layers import FeatureMap, Layers, readable


class GatedCrossAttentionConfig(Section, kind="adapter", name="gated-xattn"):
    """Settings of gated cross-attention."""

    layers: LayersSetting = "last third"
    heads: int = Field(8, ge=1, le=1024)
    head_dim: int = Field(64, ge=1, le=4096)
    feed_forward: int = Field(4, ge=0, le=64)


class Squared(nn.Module):
    """ReLU(x)², the activation of the paper's new layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class Block(nn.Module):
    """y = x + tanh(α) W_o softmax(q kᵀ / √d) v,  z = y + tanh(β) FFW(y), α = β = 0 at the start: the frozen model exactly.

    where: x (B, T, D) = what enters the text layer; q = W_q LN(x); k, v = W_k t, W_v t of the encoder's tokens t (B, N, c);
    FFW(y) = W_2 ReLU(W_1 LN(y))². ``gates``: (α, β).
    """

    def __init__(self, config: GatedCrossAttentionConfig, text: int, encoder: int, **factory: Any):
        super().__init__()
        inner, wide = config.heads * config.head_dim, config.feed_forward * text
        self.head_dim = config.head_dim
        self.norm = nn.LayerNorm(text, **factory)
        self.q = nn.Linear(text, inner, bias=False, **factory)
        self.kv = nn.Linear(encoder, 2 * inner, bias=False, **factory)
        self.o = nn.Linear(inner, text, bias=False, **factory)
        self.gates = nn.Parameter(torch.zeros(2 if wide else 1, **factory))
        self.dense = None
        if wide:
            up, down = nn.Linear(text, wide, bias=False, **factory), nn.Linear(wide, text, bias=False, **factory)
            self.dense = nn.Sequential(nn.LayerNorm(text, **factory), up, Squared(), down)

    def forward(self, states: Tensor, tokens: Tensor, shown: Tensor | None, there: Tensor | None) -> Tensor:
        """(B, T, D). ``shown`` (B, N): which tokens are read, None: all. ``there`` (B,): which samples have any."""
        x, t = states.to(self.gates.dtype), tokens.to(self.gates)
        maps = self.q(self.norm(x)), *self.kv(t).chunk(2, -1)
        heads = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in maps)
        seen = F.scaled_dot_product_attention(*heads, None if shown is None else shown[:, None, None])
        gates = self.gates.tanh() if there is None else self.gates.tanh() * there.to(x)[:, None, None, None]
        gates = gates.unbind(-1)
        x = x + gates[0] * self.o(seen.transpose(1, 2).flatten(2))
        x = x if self.dense is None else x + gates[1] * self.dense(x)
        return x.to(states.dtype)


class GatedCrossAttention(ConditionedAdapter):
    """A `Block` before each of the chosen text layers, which reads the encoder's final tokens: ``blocks.<index>``."""

    traits = Traits("gated-xattn", ("text", "encoder"), text_depends_on_input=True, conditions_text=True, reads_tokens=True)

    def __init__(self, config: GatedCrossAttentionConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleDict()
        self._picture: Layers | FeatureMap | None = None

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        text, self._picture = backbones["text"], readable(backbones["encoder"])
        layers = layouts.layers_of(text)
        indices = select_layers(self.config.layers, len(layers))
        shape = text.config.get_text_config().hidden_size, self._picture.width
        if not len(self.blocks):
            factory = {"device": text.device, "dtype": torch.promote_types(text.dtype, torch.float32)}
            self.blocks.update({str(index): Block(self.config, *shape, **factory) for index in indices})
        made = {(int(index), block.o.out_features, block.kv.in_features) for index, block in self.blocks.items()}
        if made != {(index, *shape) for index in indices}:
            raise ModelError("this gated-xattn was made for models of other widths or depth: make a new one")
        for index in indices:
            enter = self._before(self.blocks[str(index)])
            self._undo.callback(layers[index].register_forward_pre_hook(enter, with_kwargs=True).remove)
        return Attachment({"text": indices[0], "encoder": self._picture.depth})

    def _perceive(self, inputs: ModalityInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.no_grad():
            tokens, _ = self._picture.encode_tokens(inputs)
        return tokens, inputs.shown, None if inputs.lacking is None else ~inputs.lacking

    def _before(self, block: Block) -> Callable[..., Any]:
        def enter(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if self._seen is None:
                return None
            if args:
                return (block(args[0], *self._seen), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": block(kwargs["hidden_states"], *self._seen)}

        return enter
