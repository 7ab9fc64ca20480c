"""Routers: how much each expert's prompt counts for a sample in a layer, and the loss that keeps experts in use.

Shapes: B samples, D width of the layer, c width of the condition ψ, k experts, n routed layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.methods.mope.config import MoPEConfig


class ConditionRouter(nn.Module):
    """CPT's (arXiv 2312.03734): scores W ψ + b."""

    def __init__(self, condition: int, experts: int, **factory: Any):
        super().__init__()
        self.score = nn.Linear(condition, experts, **factory)

    def forward(self, mean: Tensor, condition: Tensor) -> Tensor:
        """(B, k) from the layer's mean token (B, D), which it does not read, and ψ (B, c)."""
        return self.score(condition)


class MultimodalRouter(nn.Module):
    """MoPE's (arXiv 2403.10568): scores q K with q = [A x̄ + a ; C ψ + c], x̄ the mean of the layer's tokens.

    ``keys`` K (width of q, k), the paper's routing embeddings, start orthogonal. Frozen ones are a buffer, so that no
    optimizer sees them and a checkpoint has them.
    """

    def __init__(self, config: MoPEConfig, width: int, condition: int, **factory: Any):
        super().__init__()
        of_tokens, of_condition = config.router_widths
        self.tokens = nn.Linear(width, of_tokens, **factory) if of_tokens else None
        self.condition = nn.Linear(condition, of_condition, **factory) if of_condition else None
        keys = nn.init.orthogonal_(torch.empty(of_tokens + of_condition, config.experts, **factory))
        if config.keys == "frozen":
            self.register_buffer("keys", keys)
        else:
            self.keys = nn.Parameter(keys)

    def forward(self, mean: Tensor, condition: Tensor) -> Tensor:
        """(B, k) from the layer's mean token (B, D) and ψ (B, c)."""
        parts = [part(x) for part, x in ((self.tokens, mean), (self.condition, condition)) if part is not None]
        return torch.cat(parts, dim=-1) @ self.keys


def make_router(config: MoPEConfig, width: int, condition: int, **factory: Any) -> ConditionRouter | MultimodalRouter:
    if config.router == "cpt":
        return ConditionRouter(condition, config.experts, **factory)
    return MultimodalRouter(config, width, condition, **factory)


def weigh(scores: Tensor, config: MoPEConfig, training: bool) -> tuple[Tensor, Tensor]:
    """The weights r (B, k) that are used, and the same without noise, from ``scores`` (B, k); rows sum to 1.

    r = softmax(scores / τ + ε), ε ~ N(0, noise²) in training alone. Under ``top1`` the best expert's weight is 1, with
    the gradient of r: a straight-through estimate, as a row of one weight that is always 1 would not train the router.
    """
    scores = scores / config.temperature
    clean = used = scores.softmax(-1)
    if training and config.noise_std:
        used = (scores + torch.randn_like(scores) * config.noise_std).softmax(-1)
    if config.routing == "top1":
        best = torch.zeros_like(used).scatter_(-1, used.argmax(-1, keepdim=True), 1.0)
        used = best + (used - used.detach())
    return used, clean


def squared_variation(weights: Tensor) -> Tensor:
    """(n,) squared coefficient of variation of the experts' importance Σ_b r_b: unbiased variance / mean².

    weights: (n, B, k) without noise. Zero where there is one expert. Of B samples alone: a small batch varies by chance.
    """
    importance = weights.sum(1)
    if importance.shape[-1] == 1:
        return importance.new_zeros(len(importance))
    return importance.var(-1) / importance.mean(-1).square()


def importance_loss(weights: Tensor, threshold: float) -> Tensor:
    """Mean over layers of ℓ = CV², where layers below ``threshold`` γ count 0; ``weights`` (n, B, k) without noise."""
    variation = squared_variation(weights)
    return torch.where(variation < threshold, 0.0, variation).mean()


@dataclass(frozen=True)
class Usage:
    """How the experts of each of n layers were used: squared variation of their importance, the entropy of their
    shares in nats (at most log k), and the largest share (at least 1/k). Each (n,)."""

    variation: Tensor
    entropy: Tensor
    top_share: Tensor


def usage(weights: Tensor) -> Usage:
    """Statistics of ``weights`` (n, B, k)."""
    shares = weights.mean(1)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return Usage(squared_variation(weights), entropy, shares.amax(-1))
