"""The prompts of one layer, static, dynamic and mapped, and the mapper that all layers share.

Shapes: B samples, T tokens, D width of the layer, c width of the condition ψ, l length, k experts, n prompt tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from mitrain.methods.mope.config import MoPEConfig, mapper_width
from mitrain.methods.mope.router import make_router, weigh
from mitrain.methods.mope.standard import Standard, router_gain
from mitrain.models.batch import mean_over

TEXT_SPREAD = 0.3


def uniform(shape: tuple[int, ...], init_range: float, **factory: Any) -> nn.Parameter:
    """Start values within ±init_range."""
    return nn.Parameter(torch.empty(shape, **factory).uniform_(-init_range, init_range))


def init_range_of(config: PreTrainedConfig, width: int) -> float:
    """The release's start of an encoder's prompts: √(6 / (3 p² + D)) with patches of p pixels, and 0.3 for text.

    ``width``: of the encoder's first layer.
    """
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return TEXT_SPREAD
    patch = patch if isinstance(patch, int) else max(patch)
    return math.sqrt(6 / (getattr(config, "num_channels", 3) * patch**2 + width))


class LayerPrompts(nn.Module):
    """[P_s ; P_d ; P_m] of one layer: static (l, D), Σ_j r_j E_j with ``experts`` E (k, l, D) and the router's r, and
    the mapper's (1, D), which comes from outside."""

    def __init__(self, config: MoPEConfig, width: int, condition: int, init_range: float, **factory: Any):
        super().__init__()
        self.config = config
        size = (config.length, width)
        self.static = uniform(size, init_range, **factory) if config.static else None
        self.experts = uniform((config.experts, *size), init_range, **factory) if config.dynamic else None
        self.router = make_router(config, width, condition, **factory) if config.dynamic else None
        self.standard = Standard(width, **factory) if config.dynamic and config.standardize else None

    def forward(
        self, tokens: Tensor, mask: Tensor | None, condition: Tensor | None, mapped: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The prompts (B, n, D), and the router's weights (B, k) without noise where there is one.

        tokens: (B, T, D) that enter the layer, with ``mask`` (B, T). condition: ψ (B, c) or None, where nothing may
        depend on the other modality and the static prompt is left. mapped: (B, 1, D) or None.
        """
        parts, clean = [], None
        if self.static is not None:
            parts.append(self.static.expand(len(tokens), -1, -1))
        if condition is not None and self.experts is not None:
            mean = self.mean_token(tokens, mask)
            if self.standard is not None:
                gain = router_gain(self.config.temperature)
                mean, condition = self.standard(mean) * gain, condition * gain
            weights, clean = weigh(self.router(mean, condition), self.config, self.training)
            parts.append(torch.einsum("bk,kld->bld", weights, self.experts))
        if mapped is not None:
            parts.append(mapped)
        return (torch.cat(parts, dim=1) if parts else tokens[:, :0]), clean

    def mean_token(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """(B, D), in the parameters' type, of ``tokens`` (B, T, D) with ``mask`` (B, T)."""
        tokens = tokens.to(self.experts.dtype)
        return tokens.mean(1) if mask is None else mean_over(tokens, mask)


class Mapper(nn.Module):
    """P_m = GELU(W_2 GELU(norm(W_1 ψ))): W_1 shared by all layers, W_2 by those of a stage.

    The norm is a LayerNorm. The release has a BatchNorm that stays in eval mode and so never sees a statistic.
    """

    def __init__(self, config: MoPEConfig, condition: int, stage_widths: Sequence[int], **factory: Any):
        super().__init__()
        hidden = mapper_width(config, condition)
        self.first = nn.Linear(condition, hidden, **factory)
        self.norm = nn.LayerNorm(hidden, **factory) if config.mapper_norm == "layer" else nn.Identity()
        self.stages = nn.ModuleList(nn.Linear(hidden, width, **factory) for width in stage_widths)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, condition: Tensor) -> list[Tensor]:
        """Each stage's mapped prompt (B, 1, D) from ψ (B, c)."""
        hidden = F.gelu(self.norm(self.first(condition)))
        return [self.dropout(F.gelu(stage(hidden)))[:, None] for stage in self.stages]
