"""A method in one file, as an outsider would add it: the tests register it in METHODS and touch nothing else.

It keeps its blocks under the plain names ``layers`` and ``infusions``, which nobody may take for MiT's.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.methods.base import Adapter
from mitrain.methods.selection import select_layers
from mitrain.models import frozen
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.layers import Layers


class GatedConfig(Section, kind="adapter", name="gated"):
    """``layers``: which text layers ask the picture. ``width``: d of the attention."""

    layers: str | list[int] = "last 1"
    width: int = Field(8, ge=1)


class Ask(nn.Module):
    """x + tanh(g) W_o softmax(W_q x (W_k v)ᵀ / √d) W_v v, x (B, T, D) the text's states, v (B, N, c) the picture's."""

    def __init__(self, text: int, image: int, width: int, **place: object):
        super().__init__()
        sizes = {"q": (text, width), "k": (image, width), "v": (image, width), "o": (width, text)}
        self.maps = nn.ModuleDict({name: nn.Linear(*size, bias=False, **place) for name, size in sizes.items()})
        self.gate = nn.Parameter(torch.zeros((), **place))

    def forward(self, states: Tensor, picture: Tensor) -> Tensor:
        x, v = states.to(self.gate.dtype), picture.to(self.gate.dtype)
        seen = nn.functional.scaled_dot_product_attention(self.maps["q"](x), self.maps["k"](v), self.maps["v"](v))
        return (x + self.gate.tanh() * self.maps["o"](seen)).to(states.dtype)


class Gated(Adapter):
    """After Flamingo (arXiv 2204.14198): before a few text layers, the picture's tokens through a gate, shut at first."""

    method: ClassVar[str] = "gated"
    backbones: ClassVar[tuple[str, ...]] = ("text", "image")
    text_depends_on_input: ClassVar[bool] = True

    def __init__(self, config: GatedConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        self._first: dict[str, int] = {}
        self._image: Layers | None = None
        self._picture: Tensor | None = None

    @property
    def infusions(self) -> list[str]:
        return ["not of MiT"]

    def first_layer(self, name: str) -> int:
        return self._first[name]

    def install(self, backbones: Mapping[str, PreTrainedModel]) -> None:
        text, self._image = (Layers.of(backbones[name]) for name in self.backbones)
        indices = select_layers(self.config.layers, text.depth)
        self._first = {"text": indices[0], "image": self._image.depth}
        if not len(self.layers):
            place = {"device": text.model.device, "dtype": torch.promote_types(text.model.dtype, torch.float32)}
            self.layers.extend(Ask(text.width, self._image.width, self.config.width, **place) for _ in indices)
        for index, block in zip(indices, self.layers, strict=True):
            self.undo(text.modules[index].register_forward_pre_hook(self._before(block)).remove)

    def _before(self, block: Ask):
        return lambda _, args: args if self._picture is None else (block(args[0], self._picture), *args[1:])

    def encode(self, words: TextBatch | None, picture: ModalityInputs | None) -> Outputs:
        if words is None:
            return Outputs(image=picture.feature)
        try:
            if picture is not None and picture.infused:
                with torch.no_grad():
                    self._picture, _ = self._image.encode_image(picture)
            text = frozen.last_hidden(self._backbones["text"], words)
        finally:
            self._picture = None
        return Outputs(text, words.mask, picture and picture.feature)
