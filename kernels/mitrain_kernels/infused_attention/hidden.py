"""What padding and missing modalities hide may hold anything, NaN included; times a weight of 0 it would still be NaN.

Shapes: B samples, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

import math
from typing import Any

import torch
from torch import Tensor

ORDINARY = 2.0**50
"""Hidden numbers below this are left alone: no product with them overflows in float32."""


def without_missing(present: Tensor | None, *maps: Tensor | None) -> list[Tensor | None]:
    """The maps (M, B, H, d) with 0 where ``present`` (M, B) bool is False, and so are their gradients."""
    if present is None:
        return list(maps)
    missing = ~present[:, :, None, None]
    return [x if x is None else x.masked_fill(missing, 0) for x in maps]


def without_hidden(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, ·, T, d) with 0 for what is not a number, infinite or immense in rows that padding hides.

    valid (B, Tk) bool: the rows are the last T of them.
    """
    if valid is None:
        return x
    hidden = ~valid[:, None, valid.shape[1] - x.shape[2] :, None]
    return x.masked_fill(hidden & ~(x.abs() < ORDINARY), 0)


def finite(*tensors: Tensor | None) -> bool:
    """Whether all sums are finite, which they are not where an entry is not: one read and no copy."""
    found = (x for x in tensors if x is not None)
    return all(math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))) for x in found)


class _Shield(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(valid)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return without_hidden(grad, *ctx.saved_tensors), None


def shield(output: Tensor, valid: Tensor | None) -> Tensor:
    """``output`` (B, H, Tq, d) itself, whose gradient arrives ``without_hidden``."""
    return output if valid is None or not output.requires_grad else _Shield.apply(output, valid)
