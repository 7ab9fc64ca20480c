"""A method in one file, as an outsider would add it: the tests register it in METHODS and touch nothing else.

It keeps its blocks under the plain names ``layers`` and ``infusions``, which nobody may take for MiT's.
"""

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.methods.selection import select_layers
from mitrain.models import frozen
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.layers import Layers


class GatedConfig(Section, kind="adapter", name="gated"):
    """``layers``: which text layers ask the picture. ``width``: d of the attention."""

    layers: str | list[int] = "last 1"
    width: int = Field(8, ge=1)


class Ask(nn.Module):
    """x + tanh(g) W_o softmax(W_q x (W_k v)ᵀ / √d) W_v v, x (B, T, D) the text's states, v (B, N, c) the image's tokens."""

    def __init__(self, text: int, image: int, width: int, **factory: object):
        super().__init__()
        sizes = {"q": (text, width), "k": (image, width), "v": (image, width), "o": (width, text)}
        self.maps = nn.ModuleDict({name: nn.Linear(*size, bias=False, **factory) for name, size in sizes.items()})
        self.gate = nn.Parameter(torch.zeros((), **factory))

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        x, v = states.to(self.gate.dtype), tokens.to(self.gate.dtype)
        seen = nn.functional.scaled_dot_product_attention(self.maps["q"](x), self.maps["k"](v), self.maps["v"](v))
        return (x + self.gate.tanh() * self.maps["o"](seen)).to(states.dtype)


class Gated(Adapter):
    """After Flamingo (arXiv 2204.14198): before a few text layers, the picture's tokens through a gate, shut at first."""

    traits = Traits("gated", backbones=("text", "encoder"), text_depends_on_input=True)

    def __init__(self, config: GatedConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        self._picture: Tensor | None = None

    @property
    def infusions(self) -> list[str]:
        return ["not of MiT"]

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        text, self._encoder = (Layers.of(backbones[name]) for name in self.traits.backbones)
        indices = select_layers(self.config.layers, text.depth)
        if not len(self.layers):
            factory = {"device": text.model.device, "dtype": torch.promote_types(text.model.dtype, torch.float32)}
            self.layers.extend(Ask(text.width, self._encoder.width, self.config.width, **factory) for _ in indices)
        for index, block in zip(indices, self.layers, strict=True):
            self._undo.callback(text.modules[index].register_forward_pre_hook(self._before(block)).remove)
        return Attachment({"text": indices[0], "encoder": self._encoder.depth})

    def _before(self, block: Ask):
        return lambda _, args: args if self._picture is None else (block(args[0], self._picture), *args[1:])

    def encode(self, texts: TextBatch | None, inputs: ModalityInputs | None) -> Outputs:
        if texts is None:
            return Outputs(vectors=inputs.features)
        try:
            if inputs is not None and inputs.infused:
                with torch.no_grad():
                    self._picture, _ = self._encoder.encode_tokens(inputs)
            text = frozen.last_hidden(self._backbones["text"], texts)
        finally:
            self._picture = None
        return Outputs(text, texts.mask, inputs.features if inputs else {})
