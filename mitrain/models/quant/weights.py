"""A frozen low-bit matrix W (out, in) as a factor: x Wᵀ and its gradient, a few rows of W in floats at a time.

The gradient of x needs W alone: neither x nor a float copy of W is kept for the backward pass. What is kept are the
*parameter objects*, read when they are needed, in backward again: under ZeRO-3 a parameter's data is a placeholder
between uses, and a saved tensor or a view would be one that is empty or never freed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.models.quant import formats, kernels

GPU_PIECE = 2**24


@dataclass(frozen=True)
class Int8Weight:
    """``qweight`` int8 (out, in), ``scale`` fp32 (out,): W = qweight · scale."""

    qweight: nn.Parameter
    scale: nn.Parameter
    shape: tuple[int, int]
    block = 1

    def rows(self, part: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """A float matrix (rows, in) and the factor (rows,) that its rows still lack.

        Whole numbers up to 127 are exact in every float type, so the steps come after the product; in fp16 sums of
        such numbers could overflow, so there they come first.
        """
        payload, scale = self.qweight.data[part], self.scale.data[part]
        if dtype == torch.float16:
            return (payload.float() * scale.float()[:, None]).to(dtype), None
        return payload.to(dtype), scale.to(dtype)


@dataclass(frozen=True)
class Nf4Weight:
    """``qweight`` uint8 (⌈n/2⌉,) and ``absmax`` fp32 (⌈n/block⌉,) of the n = out · in weights."""

    qweight: nn.Parameter
    absmax: nn.Parameter
    shape: tuple[int, int]
    block: int = formats.NF4_BLOCK

    def rows(self, part: slice, dtype: torch.dtype) -> tuple[Tensor, None]:
        """A float matrix (rows, in); ``part`` starts where a block does."""
        columns = self.shape[1]
        start, count = part.start * columns, (part.stop - part.start) * columns
        packed = self.qweight.data[start // 2 : -(-(start + count) // 2)]
        absmax = self.absmax.data[start // self.block : -(-(start + count) // self.block)]
        return kernels.dequantise_nf4(packed, absmax, self.block, count, dtype).view(-1, columns), None


Weight = Int8Weight | Nf4Weight


def compute_dtype(x: Tensor) -> torch.dtype:
    """On a CPU at least fp32: most have no 16-bit arithmetic, and emulating it is many times slower."""
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype


def pieces(weight: Weight, device: torch.device) -> Iterator[slice]:
    """The rows of W in parts that end where blocks do."""
    out, columns = weight.shape
    step = formats.piece_rows(columns, weight.block, None if device.type == "cpu" else GPU_PIECE)
    return (slice(start, min(start + step, out)) for start in range(0, out, step))


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """x (N, in) → x Wᵀ (N, out) in x's compute type."""
    dtype = compute_dtype(x)
    x, out = x.to(dtype), torch.empty(len(x), weight.shape[0], dtype=dtype, device=x.device)
    for part in pieces(weight, x.device):
        rows, factor = weight.rows(part, dtype)
        torch.mm(x, rows.t(), out=out[:, part]) if factor is None else torch.mul(x @ rows.t(), factor, out=out[:, part])
    return out


def transposed_matmul(grad: Tensor, weight: Weight) -> Tensor:
    """grad (N, out) → grad W (N, in) in grad's type; parts are summed in fp32 at least."""
    dtype = compute_dtype(grad)
    total = torch.zeros(len(grad), weight.shape[1], dtype=torch.promote_types(dtype, torch.float32), device=grad.device)
    for part in pieces(weight, grad.device):
        rows, factor = weight.rows(part, dtype)
        given = grad[:, part].to(dtype)
        total += (given if factor is None else given * factor) @ rows
    return total.to(grad.dtype)


class FrozenProduct(torch.autograd.Function):
    """x (N, in) → x Wᵀ + bias (N, out) in x's type; ``threshold`` (int8 only): with quantised activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: nn.Parameter | None, threshold: float | None) -> Tensor:
        ctx.weight = weight
        out = matmul(x, weight) if threshold is None else int8_matmul(x, weight, threshold)
        if bias is not None:
            out += bias.data
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        return transposed_matmul(grad, ctx.weight) if ctx.needs_input_grad[0] else None, None, None, None


def int8_matmul(x: Tensor, weight: Int8Weight, threshold: float) -> Tensor:
    """x (N, in) → x Wᵀ with x in int8 too (LLM.int8(), Dettmers et al. 2022, https://arxiv.org/abs/2208.07339).

    Columns of x with a value above ``threshold`` keep full precision; the rest is rounded with a step per row of x, and
    the products of whole numbers are exact.
    """
    dtype = compute_dtype(x)
    outliers = (x.abs() > threshold).any(0)
    payload, scale = weight.qweight.data, weight.scale.data.float()
    rounded, step = formats.quantise_rows(x.masked_fill(outliers, 0))
    out = kernels.int8_product(rounded, payload).float() * step[:, None] * scale
    columns = outliers.nonzero()[:, 0]
    if len(columns):
        full = payload[:, columns].float() * scale[:, None]
        out += x[:, columns].float() @ full.t()
    return out.to(dtype)
