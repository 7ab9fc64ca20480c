"""Quantising a loaded model in place, one matrix at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import layouts
from mitrain.models.quant.linear import FrozenInt8Embedding, FrozenInt8Linear, FrozenLinear, FrozenNF4Linear

Precision = Literal["none", "int8", "int8-activations", "nf4"]
PRECISIONS = ("none", "int8", "int8-activations", "nf4")


@dataclass(frozen=True)
class ModuleRef:
    """A module inside a model: ``name`` from the model, held by ``owner`` as ``attribute``."""

    name: str
    owner: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.owner, self.attribute)

    def put(self, module: nn.Module) -> None:
        setattr(self.owner, self.attribute, module)


def storage(precision: str) -> str:
    """How the weights of ``precision`` are stored: fp types as they are, ``int8-activations`` as ``int8``."""
    return precision.removesuffix("-activations")


def quantised(linear: nn.Linear, precision: str) -> FrozenLinear:
    """A frozen low-bit copy of ``linear``; on the meta device an empty one."""
    kind, options = frozen_kind(precision)
    if linear.weight.is_meta:
        bias = None if linear.bias is None else linear.bias.data
        return kind(linear.in_features, linear.out_features, bias, device=torch.device("meta"), **options)
    return kind.of(linear, **options)


def frozen_kind(precision: str) -> tuple[type[FrozenLinear], dict[str, bool]]:
    if precision == "nf4":
        return FrozenNF4Linear, {}
    if precision in PRECISIONS[1:]:
        return FrozenInt8Linear, {"activations": precision == "int8-activations"}
    raise ConfigError(f"precision {precision!r} is no low-bit format: choose one of {', '.join(PRECISIONS[1:])}")


def quantise(model: PreTrainedModel, precision: str, embedding: bool = False) -> PreTrainedModel:
    """Replace the frozen linear layers of ``model``'s decoder layers, in place; names of modules stay.

    embedding: the input embedding goes to int8 too, and so does a head that is tied to it, onto the same payload.
    Everything else stays as it is. Above the model's own bytes no more than the payload of one matrix is held, and one
    piece of it in fp32.
    """
    frozen_kind(precision)
    refs = list(linear_refs(model))
    if not refs:
        others = sorted({type(m).__name__ for m in layouts.layers_of(model).modules() if is_matrix(m)} - {"Linear"})
        why = f"its layers' matrices are {' and '.join(others)}" if others else "none of its layers' matrices is frozen"
        raise ModelError(
            f"{type(model).__name__} cannot be held in low bits, which is done for frozen Linear layers alone ({why}): set"
            " model.quantize=none" + ("" if others else ", or freeze it first")
        )
    for ref in refs:
        ref.put(quantised(ref.module, precision))
    if embedding:
        quantise_embedding(model)
    return model


def is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2


def linear_refs(model: PreTrainedModel) -> Iterator[ModuleRef]:
    """The frozen ``nn.Linear`` modules inside the decoder's layers; subclasses compute something else and stay."""
    owner, name = layouts.layer_owner(model)
    prefix = next(n for n, module in model.named_modules() if module is owner)
    prefix = f"{prefix}.{name}" if prefix else name
    layers = getattr(owner, name)
    for path, module in list(layers.named_modules()):
        above, _, last = path.rpartition(".")
        if type(module) is nn.Linear and not module.weight.requires_grad:
            yield ModuleRef(f"{prefix}.{path}", layers.get_submodule(above), last)


def quantise_embedding(model: PreTrainedModel) -> None:
    """The input embedding to int8, in place; a tied head takes the same payload."""
    before, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(before) is not nn.Embedding:
        raise ModelError(
            f"{type(model).__name__} embeds with a {type(before).__name__}, which is more than a table:"
            " set model.quantize_embedding=false"
        )
    tied = head is not None and head.weight is before.weight
    if before.weight.is_meta:
        rows, width = before.weight.shape
        table = FrozenInt8Embedding(rows, width, before.weight.dtype, torch.device("meta"))
    else:
        table = FrozenInt8Embedding.of(before)
    model.set_input_embeddings(table)
    if tied:
        model.set_output_embeddings(table.head(head.bias))
