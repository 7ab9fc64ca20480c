"""MiT's trainable maps: from a modality's global feature vector to the factors of one layer.

Shapes: B batch, M modalities, H query heads, d head width, e feature width, d_ff feed-forward width.
"""

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.methods.mit.attention import LayerMaps
from mitrain.methods.mit.condition import Condition
from mitrain.methods.mit.decoder import LayerShape

HEAD_LOGIT = 1.0
"""Initial head logit of the authors' release: gates open to σ(1) = 0.73. The identity init needs no other value, as
there the gate multiplies zeros, and a smaller one would only slow the maps' first steps."""


def attention_maps(k_add: bool, terms: str) -> tuple[str, ...]:
    """The attention's maps that exist, where ``terms`` (both, multiply, add) leaves some out."""
    names = ("k_mul", "k_add", "v_mul", "v_add") if k_add else ("k_mul", "v_mul", "v_add")
    endings = {"both": ("_mul", "_add"), "multiply": ("_mul",), "add": ("_add",)}[terms]
    return tuple(name for name in names if name.endswith(endings))


class ModalityMaps(nn.Module):
    """One modality's affine maps into one layer: e -> H·d for keys and values, e -> d_ff for the feed-forward.

    k_mul = I W_d^k + b_d^k     k_add = I W_a^k + b_a^k     (MiT, arXiv 2403.05060, Eq. 1; our names ↔ theirs)
    v_mul = I W_d^v + b_d^v     v_add = I W_a^v + b_a^v     ffn = I W_f + b_f  (Eq. 7)
    """

    def __init__(self, width: int, shape: LayerShape, names: tuple[str, ...], ffn: bool, **factory: Any):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, shape.heads * shape.head_dim, **factory))
        if ffn:
            self.ffn = nn.Linear(width, shape.ffn, **factory)

    @torch.no_grad()
    def start_as_identity(self, factor: float) -> None:
        """Zero weights; the biases make the multiplying attention maps ``factor``, the feed-forward's 1, the rest 0."""
        for name, linear in self.named_children():
            linear.weight.zero_()
            linear.bias.fill_({"ffn": 1.0, "k_mul": factor, "v_mul": factor}.get(name, 0.0))


class LayerInfusion(nn.Module):
    """All modalities' maps into one layer, the attention's by their ``names``, and its head logits L (M, H); ``factory`` is
    their device and dtype. A map that is left out gives zeros."""

    def __init__(
        self, widths: Mapping[str, int], shape: LayerShape, names: tuple[str, ...], *, ffn: bool, base: int, **factory: Any
    ):
        super().__init__()
        self.shape, self.base, self.names = shape, base, names
        modalities = {name: ModalityMaps(width, shape, names, ffn, **factory) for name, width in widths.items()}
        self.maps = nn.ModuleDict(modalities)
        self.head_logit = nn.Parameter(torch.full((len(widths), shape.heads), HEAD_LOGIT, **factory))

    def start_as_identity(self) -> None:
        """Base 1: exactly the frozen layer. Base 0 has no exact identity; where all modalities are present and v_add
        is 0, the factors 1 / (M σ(L)) give the frozen layer but for rounding."""
        gate = 1 / (1 + math.exp(-HEAD_LOGIT))
        for maps in self.maps.values():
            maps.start_as_identity(0.0 if self.base else 1.0 / (len(self.maps) * gate))

    def forward(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> LayerMaps:
        """``inputs`` name -> (B, e) of the modalities that are there, ``present`` name -> (B,) bool where some lack."""
        order = list(self.maps)
        there = [name for name in order if name in inputs]
        size = (len(there), -1, self.shape.heads, self.shape.head_dim)
        mask = None
        if present:
            everywhere = torch.ones_like(next(iter(present.values())))
            mask = torch.stack([present.get(name, everywhere) for name in there])

        def mapped(kind: str) -> Tensor:
            if kind not in self.names:
                return self.head_logit.new_zeros(len(there), len(inputs[there[0]]), *size[2:])
            return torch.stack([getattr(self.maps[name], kind)(inputs[name]) for name in there]).view(size)

        return LayerMaps(
            k_mul=mapped("k_mul"),
            v_mul=mapped("v_mul"),
            v_add=mapped("v_add"),
            k_add=mapped("k_add") if "k_add" in self.names else None,
            head_logit=self.head_logit[[order.index(name) for name in there]],
            present=mask,
            base=self.base if self.base or mask is None else (~mask.any(0)).to(torch.int64),
        )

    def ffn_factor(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """f = Π_m (I_m W_f + b_f), (B, d_ff); a missing modality's factor is 1. Arguments as in ``forward``."""
        factors = {name: self.maps[name].ffn(x) for name, x in inputs.items()}
        for name, mask in present.items():
            factors[name] = torch.where(mask[:, None], factors[name], 1)
        return reduce(torch.mul, factors.values())


def inputs_of(
    condition: Condition, batch: int, like: Tensor, projections: nn.ModuleDict
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The maps' inputs for ``batch`` rows, in the maps' type and place, low-rank projected where there is one."""
    rows = condition.for_batch(batch)
    inputs = {name: x.to(like.device, like.dtype) for name, x in rows.features.items()}
    if len(projections):
        inputs = {name: projections[name](x) for name, x in inputs.items()}
    return inputs, {name: x.to(like.device) for name, x in rows.present.items()}
