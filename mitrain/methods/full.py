"""Full fine-tuning: every weight of the chosen backbones is trained. What parameter-efficient methods save on."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.methods.peft import SIDES, STORED, Where
from mitrain.models import layouts, loading
from mitrain.models.layers import Layers


class FullConfig(Section, kind="adapter", name="full"):
    """What embeds the encoder's input stays as it is, whatever ``layers`` says: files enter above it."""

    where: Where = "both"
    layers: int | None = Field(None, ge=1)


class Full(Adapter):
    """The backbones' own parameters under ``weights``, a point in a name written as a slash; a copy of the pretrained
    ones is kept, for `detach` and for what frozen encoders say."""

    traits = Traits("full")

    def __init__(self, config: FullConfig):
        super().__init__()
        self.config = config
        self.traits = replace(self.traits, backbones=("text",) if config.where == "text" else ("text", "encoder"))
        self.weights = nn.ParameterDict()
        self._pretrained: dict[str, Tensor] = {}

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        first_layers = {name: len(layouts.layers_of(model)) for name, model in backbones.items()}
        for name in SIDES[self.config.where]:
            depth, count = first_layers[name], self.config.layers
            first_layers[name] = depth - count if count else 0
            if count and count > depth:
                raise ConfigError(
                    f"adapter.layers={count}, but the {name} model has {depth} layers: give at"
                    " most as many, or null for all and the words' embeddings"
                )
        self._encoder = Layers.of(backbones["encoder"]) if "encoder" in SIDES[self.config.where] else None
        trained = dict(self._trained(backbones, first_layers))
        if self.weights and {n: p.shape for n, p in self.weights.items()} != {n: p.shape for n, p in trained.items()}:
            raise ModelError("this full fine-tuning was made for other models: make a new one")
        own = {name: parameter.detach().clone() for name, parameter in self.weights.items()}
        self._pretrained = {name: parameter.detach().clone() for name, parameter in trained.items()}
        self.weights = nn.ParameterDict(trained)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self._exchange(own)
        self._undo.callback(self._let_go)
        return Attachment(first_layers, encoder_width=0 if self._encoder is None else self._encoder.width)

    def _trained(
        self, backbones: Mapping[str, PreTrainedModel], first_layers: Mapping[str, int]
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Of float models what a pass goes through: the topmost layers and what follows them, or all that there is."""
        for side in SIDES[self.config.where]:
            model = backbones[side]
            inside = ids([model.base_model])
            below = ids(layouts.layers_of(model)[: first_layers[side]])
            if side == "encoder" and model.main_input_name != "pixel_values":  # its states enter above all that is no layer
                inside = ids((*layouts.layers_of(model), *self._encoder.norms))
            no_embeddings = side == "encoder" or self.config.layers is not None
            for name, parameter in model.named_parameters():
                if not parameter.is_floating_point() or loading.is_sharded(parameter):
                    raise ModelError(
                        f"full fine-tuning needs the {side} model whole and in floats: set model.quantize=none, zero.stage=0"
                    )
                left_out = "pooler" in name or (no_embeddings and "embed" in name)
                if id(parameter) in inside - below and not left_out:
                    yield f"{STORED[side]}/{name.replace('.', '/')}", parameter

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


def ids(modules: Iterable[nn.Module]) -> set[int]:
    """Of the modules' parameters."""
    return {id(parameter) for module in modules for parameter in module.parameters()}
