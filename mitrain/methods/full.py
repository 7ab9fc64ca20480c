"""Full fine-tuning: every weight of the chosen backbones is trained. What parameter-efficient methods save on."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.base import Adapter
from mitrain.methods.peft import SIDES, Where
from mitrain.models import layouts, loading
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.layers import Layers


class FullConfig(Section, kind="adapter", name="full"):
    """``where``: which models are trained. ``layers``: how many of the topmost layers of each; none: all, and the words'
    embeddings. The image encoder's patch embeddings stay as they are: pictures enter above them."""

    where: Where = "both"
    layers: int | None = Field(None, ge=1)


class Full(Adapter):
    """The backbones' own parameters under ``weights``, a point in a name written as a slash; a copy of the pretrained
    ones is kept, for `detach` and for what frozen encoders say."""

    method: ClassVar[str] = "full"

    def __init__(self, config: FullConfig):
        super().__init__()
        self.config = config
        self.backbones = ("text",) if config.where == "text" else ("text", "image")
        self.weights = nn.ParameterDict()
        self._pretrained: dict[str, Tensor] = {}
        self._depth: dict[str, int] = {}
        self._image: Layers | None = None

    def first_layer(self, name: str) -> int:
        if name not in SIDES[self.config.where]:
            return self._depth[name]
        return max(0, self._depth[name] - (self.config.layers or self._depth[name]))

    def image_width(self, feature: int) -> int:
        return feature if self._image is None else self._image.width

    def install(self, backbones: Mapping[str, PreTrainedModel]) -> None:
        self._depth = {name: len(layouts.layers_of(model)) for name, model in backbones.items()}
        for name in SIDES[self.config.where]:
            if (self.config.layers or 0) > self._depth[name]:
                raise ConfigError(
                    f"adapter.layers={self.config.layers}, but the {name} model has {self._depth[name]} layers: give at"
                    " most as many, or null for all and the words' embeddings"
                )
        self._image = Layers.of(backbones["image"]) if "image" in SIDES[self.config.where] else None
        trained = dict(self._trained(backbones))
        if self.weights and {n: p.shape for n, p in self.weights.items()} != {n: p.shape for n, p in trained.items()}:
            raise ModelError("this full fine-tuning was made for other models: make a new one")
        own = {name: parameter.detach().clone() for name, parameter in self.weights.items()}
        self._pretrained = {name: parameter.detach().clone() for name, parameter in trained.items()}
        self.weights = nn.ParameterDict(trained)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self._exchange(own)
        self.undo(self._let_go)

    def _trained(self, backbones: Mapping[str, PreTrainedModel]) -> Iterator[tuple[str, nn.Parameter]]:
        """Of float models what a reading goes through: the topmost layers and what follows them, or all that there is."""
        for side in SIDES[self.config.where]:
            model = backbones[side]
            inside = {id(p) for p in model.base_model.parameters()}
            below = {id(p) for layer in layouts.layers_of(model)[: self.first_layer(side)] for p in layer.parameters()}
            no_embeddings = side == "image" or self.config.layers is not None
            for name, parameter in model.named_parameters():
                if not parameter.is_floating_point() or loading.is_sharded(parameter):
                    raise ModelError(
                        f"full fine-tuning needs the {side} model whole and in floats: set model.quantize=none, zero.stage=0"
                    )
                left_out = "pooler" in name or (no_embeddings and "embed" in name)
                if id(parameter) in inside - below and not left_out:
                    yield f"{side}/{name.replace('.', '/')}", parameter

    @torch.no_grad()
    def _exchange(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)

    def _let_go(self) -> None:
        """Pretrained values back into the models; the adapter keeps its own as parameters of its own."""
        own = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in self.weights.items()}
        self._exchange(self._pretrained)
        for parameter in self.weights.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.weights, self._pretrained = nn.ParameterDict(own), {}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        own = {name: parameter.detach().clone() for name, parameter in self.weights.items()}
        self._exchange(self._pretrained)
        try:
            yield
        finally:
            self._exchange(own)

    def merge(self) -> None:
        """The models keep the trained values."""
        self._pretrained = {name: parameter.detach().clone() for name, parameter in self.weights.items()}
        self.detach()

    def encode(self, words: TextBatch | None, picture: ModalityInputs | None) -> Outputs:
        found = super().encode(words, picture)
        if picture is None or self._image is None:
            return found
        return Outputs(found.text, found.mask, self._image.encode_image(picture)[1])
