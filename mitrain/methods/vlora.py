"""Perceptual weights, after VLoRA (arXiv 2405.20339, section 3): a picture becomes a low-rank update of the language model's
matrices for its sample alone; no visual tokens stand in the sequence.

Where this departs from the authors' release: one generator makes the updates of all matrices, as in the paper's figure,
where theirs has one for each kind; the tokens get no position embeddings of the generator's own; with ``reads: vector``
it reads the encoders' global features, which is what MiT is given, in place of tokens; a trained token stands beside
those that are read, so that a query can attend to a single one or not.

Shapes: B samples, T text tokens, M tokens read, n tuned matrices (out, into), r rank, w width of the generator.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.base import Attachment, Traits
from mitrain.methods.conditioned import ConditionedAdapter
from mitrain.methods.mit.lora import sizes_of
from mitrain.methods.selection import LayersSetting, select_layers
from mitrain.models import layouts
from mitrain.models.batch import ModalityInputs
from mitrain.models.layers import FeatureMap, Layers, readable
from mitrain.models.layouts import Projection


class VLoRAConfig(Section, kind="adapter", name="vlora"):
    """Settings of VLoRA."""

    reads: Literal["tokens", "vector"] = "tokens"
    layers: LayersSetting = "last third"
    targets: tuple[Projection, ...] = Field(("q", "v"), min_length=1)
    rank: int = Field(8, ge=1, le=65536)
    width: int = Field(128, ge=1, le=1 << 16)
    heads: int = Field(4, ge=1, le=1024)
    blocks: int = Field(1, ge=1, le=64)
    modalities: dict[str, Annotated[int, Field(gt=0, le=1 << 20)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_heads(self) -> "VLoRAConfig":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not divisible by heads={self.heads}: give a multiple of it")
        return self


class Generator(nn.Module):
    """A_1 … A_n = W_s LN(decoder(queries, W_e tokens)): one query for each matrix, one W_s (into · r, w) for all."""

    def __init__(self, config: VLoRAConfig, widths: Mapping[str, int], count: int, into: int, **factory: Any):
        super().__init__()
        width = config.width
        self.enter = nn.ModuleDict({name: nn.Linear(size, width, **factory) for name, size in widths.items()})
        self.queries = nn.Parameter(torch.randn(count, width, **factory))
        self.nothing = nn.Parameter(torch.zeros(1, width, **factory))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        block = nn.TransformerDecoderLayer(width, config.heads, 4 * width, **options, **factory)
        self.decoder = nn.TransformerDecoder(block, config.blocks, norm=nn.LayerNorm(width, **factory))
        self.factor = nn.Linear(width, into * config.rank, **factory)
        nn.init.normal_(self.factor.weight, std=(width * into) ** -0.5)  # so that Aᵀx is about as large as x's entries

    def forward(self, given: Mapping[str, Tensor], shown: Tensor | None) -> Tensor:
        """(B, n, into · r) of the tokens (B, M, e) of each name, side by side, of which those ``shown`` (B, M) are read."""
        tokens = [self.enter[name](x.to(self.queries)) for name, x in given.items()]
        memory = torch.cat([self.nothing.expand(len(tokens[0]), 1, -1), *tokens], 1)
        hidden = None if shown is None else F.pad(~shown, (1, 0))
        return self.factor(self.decoder(self.queries.expand(len(memory), -1, -1), memory, memory_key_padding_mask=hidden))


class VLoRA(ConditionedAdapter):
    """h = W x + B_i A_i(picture)ᵀ x for each tuned matrix i; B_i (out, r) is trained and 0 at the start: the frozen model.

    ``ups.<i>``: B_i, in the order of the layers and of the projections in them. A narrower matrix takes the leading rows of
    its A (into, r).
    """

    traits = Traits("vlora", ("text", "encoder"), text_depends_on_input=True, conditions_text=True, reads_tokens=True)

    def __init__(self, config: VLoRAConfig):
        super().__init__()
        self.config = config
        if config.reads == "vector":
            self.traits = replace(self.traits, backbones=("text",))
            if not config.modalities:
                raise ConfigError("adapter.modalities is empty: name each modality and its feature width, as {image: 768}")
        self.generator: Generator | None = None
        self.ups = nn.ParameterList()
        self._picture: Layers | FeatureMap | None = None

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        text, config = backbones["text"], self.config
        indices = select_layers(config.layers, len(layouts.layers_of(text)))
        modules = [module for *_, module in layouts.projections(text, config.targets, indices)]
        sizes = [sizes_of(module) for module in modules]
        self._picture = readable(backbones["encoder"]) if config.reads == "tokens" else None
        widths = config.modalities if self._picture is None else {"tokens": self._picture.width}
        self._make_parameters(text, sizes, widths)
        for place, module in enumerate(modules):
            self._undo.callback(module.register_forward_hook(self._hook(place, sizes[place][0])).remove)
        if self._picture is None:
            return Attachment({"text": indices[0]}, modalities=widths)
        return Attachment({"text": indices[0], "encoder": self._picture.depth})

    def _make_parameters(self, text: PreTrainedModel, sizes: list[tuple[int, int]], widths: Mapping[str, int]) -> None:
        rank, into = self.config.rank, max(into for into, _ in sizes)
        if self.generator is None:
            factory = {"device": text.device, "dtype": torch.promote_types(text.dtype, torch.float32)}
            self.generator = Generator(self.config, widths, len(sizes), into, **factory)
            self.ups.extend(nn.Parameter(torch.zeros(out, rank, **factory)) for _, out in sizes)
        made = {name: enter.in_features for name, enter in self.generator.enter.items()}
        there = made, [len(up) for up in self.ups], self.generator.factor.out_features
        if there != (dict(widths), [out for _, out in sizes], into * rank):
            raise ModelError("this vlora was made for models of other widths or depth: make a new one")

    def _perceive(self, inputs: ModalityInputs) -> Tensor:
        """(B, n, into, r): every sample's A_i, 0 of one that has nothing to be read."""
        if self._picture is not None:
            with torch.no_grad():
                given = {"tokens": self._picture.encode_tokens(inputs)[0]}
            shown, lacking = inputs.shown, inputs.lacking
        else:
            given = {name: inputs.features[name][:, None] for name in self.config.modalities}
            shown = torch.stack([inputs.has(name) for name in given], 1) if inputs.present else None
            lacking = None if shown is None else ~shown.any(1)
        factors = self.generator(given, shown).unflatten(-1, (-1, self.config.rank))
        return factors if lacking is None else factors * ~lacking[:, None, None, None]

    def _hook(self, place: int, into: int) -> Callable[..., Tensor | None]:
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if self._seen is None:
                return None
            factor = self._seen[:, place, :into]
            return output + (args[0].to(factor.dtype) @ factor @ self.ups[place].T).to(output.dtype)

        return add
