"""UniAdapter (arXiv 2302.06605, section 3.2): adapters beside the feed-forwards of both models, whose down-projection the
two modalities share, while each has an up-projection of its own.

The paper's third, cross-modal up-projection belongs to the cross-attention layers of BLIP's text model and is left out:
here the two models are read side by side. Where depth or width differ, which they do not in BLIP, layers are paired from
the top, and the narrower model takes the leading columns of the shared matrix.

Shapes: B samples, T tokens, D width of a model, r of the bottleneck.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ModelError
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.models import layouts
from mitrain.models.layers import Layers


class UniAdapterConfig(Section, kind="adapter", name="uniadapter"):
    """Settings of UniAdapter."""

    width: int = Field(128, ge=1, le=1 << 16)
    scale: float = Field(0.1, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class Shared(nn.Module):
    """s (W_m ReLU(W_down LN(x) + b) + b_m) for a pair of layers: m = text or encoder; W_m = b_m = 0 at the start.

    LN has no factors of its own: W_down and b hold any.
    """

    def __init__(self, config: UniAdapterConfig, widths: Mapping[str, int], **factory: Any):
        super().__init__()
        self.config = config
        self.down = nn.Linear(max(widths.values()), config.width, **factory)
        self.up = nn.ModuleDict({side: nn.Linear(config.width, width, **factory) for side, width in widths.items()})
        for up in self.up.values():
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    @property
    def widths(self) -> dict[str, int]:
        return {side: up.out_features for side, up in self.up.items()}

    def forward(self, side: str, entered: Tensor) -> Tensor:
        """(B, T, D) in the parameters' type, of what ``entered`` the feed-forward of the model ``side``."""
        x = F.layer_norm(entered.to(self.down.weight.dtype), entered.shape[-1:])
        inner = F.linear(x, self.down.weight[:, : x.shape[-1]], self.down.bias).relu()
        return self.config.scale * self.up[side](F.dropout(inner, self.config.dropout, self.training))


class UniAdapter(Adapter):
    """``pairs.<i>``: what the i-th layers from the top share, with ``down`` and ``up.<text|encoder>``."""

    traits = Traits("uniadapter", backbones=("text", "encoder"))

    def __init__(self, config: UniAdapterConfig):
        super().__init__()
        self.config = config
        self.pairs = nn.ModuleList()
        self._entered: dict[Any, Tensor] = {}

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        self._encoder, text = Layers.of(backbones["encoder"]), backbones["text"]
        stacks = {side: list(layouts.layers_of(backbones[side]))[::-1] for side in self.traits.backbones}
        sizes = {"text": text.config.get_text_config().hidden_size, "encoder": self._encoder.width}
        shapes = [
            {side: sizes[side] for side, layers in stacks.items() if place < len(layers)}
            for place in range(max(map(len, stacks.values())))
        ]
        if not len(self.pairs):
            factory = {"device": text.device, "dtype": torch.promote_types(text.dtype, torch.float32)}
            self.pairs.extend(Shared(self.config, widths, **factory) for widths in shapes)
        if [pair.widths for pair in self.pairs] != shapes:
            raise ModelError("this uniadapter was made for models of other widths or depth: make a new one")
        for side, layers in stacks.items():
            for place, layer in enumerate(layers):
                self._beside_feed_forward(backbones[side], side, place, layer)
        return Attachment(dict.fromkeys(self.traits.backbones, 0), self._encoder.width)

    def _beside_feed_forward(self, model: PreTrainedModel, side: str, place: int, layer: nn.Module) -> None:
        found = [module for _, module, kinds in layouts.linear_projections(layer) if kinds == ("mlp",)]
        if len(found) < 2:
            raise ModelError(
                f"uniadapter stands beside the feed-forward, whose projections in {type(model).__name__} have no known name:"
                " take another model or method"
            )
        key = side, place
        self._undo.callback(found[0].register_forward_pre_hook(self._enter(key)).remove)
        self._undo.callback(found[-1].register_forward_hook(self._leave(key)).remove)

    def _enter(self, key: tuple[str, int]) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple) -> None:
            if not self._disabled:
                self._entered[threading.get_ident(), key] = args[0]

        return keep

    def _leave(self, key: tuple[str, int]) -> Callable[..., Tensor | None]:
        side, place = key

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            entered = self._entered.pop((threading.get_ident(), key), None)
            return None if entered is None else output + self.pairs[place](side, entered).to(output.dtype)

        return add

    def merge(self) -> None:
        raise ModelError("uniadapter is not linear and cannot be merged: keep it attached")
