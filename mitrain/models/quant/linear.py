"""Frozen linear layers, and an embedding with its tied head, with low-bit weights.

The payload and its steps are ordinary frozen parameters, so whatever shards parameters shards both. The state dict of
a layer ``name``:

    int8    name.qweight int8 (out, in)    name.scale fp32 (out,)             name.bias
    nf4     name.qweight uint8 (⌈n/2⌉,)    name.absmax fp32 (⌈n/block⌉,)      name.bias      n = out · in
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mitrain.models.quant import formats
from mitrain.models.quant.weights import FrozenProduct, Int8Weight, Nf4Weight, Weight, pieces

OUTLIER = 6.0


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class FrozenLinear(nn.Module, ABC):
    """y = x Wᵀ + b with a low-bit W that is never trained; only the gradient of x is known."""

    steps: ClassVar[str]
    """The name of the parameter of steps. It stays fp32 when the model's type is changed."""
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else frozen(bias))

    @property
    @abstractmethod
    def weight_view(self) -> Weight:
        """The payload and its steps, by their parameters."""

    @abstractmethod
    def fill(self, weight: Tensor) -> None:
        """Take the payload from a float matrix (out, in), a piece at a time."""

    @classmethod
    def of(cls, linear: nn.Linear, **options: Any) -> Self:
        """A quantised copy of ``linear``, on its device; the bias is shared."""
        made = cls(linear.in_features, linear.out_features, None, device=torch.device("meta"), **options)
        if linear.bias is not None:
            made.bias = linear.bias.requires_grad_(False)
        made.fill(linear.weight.detach())
        return made

    def forward(self, x: Tensor) -> Tensor:
        out = FrozenProduct.apply(x.reshape(-1, self.in_features), self.weight_view, self.bias, self.threshold)
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def threshold(self) -> float | None:
        return None

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (out, in) in floats, whole."""
        view, wide = self.weight_view, torch.promote_types(dtype, torch.float32)
        parts = [view.rows(part, wide) for part in pieces(view, self.qweight.device)]
        return torch.cat([(rows if factor is None else rows * factor[:, None]).to(dtype) for rows, factor in parts])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keeping(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keep = tensor is getattr(self, self.steps) and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if keep else moved

        return super()._apply(keeping, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FrozenInt8Linear(FrozenLinear):
    """W = qweight · scale, a step per row. ``activations``: x is rounded to int8 too, but for its columns above
    ``outlier`` (LLM.int8()); the gradient is that of the weights alone."""

    steps = "scale"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        *,
        activations: bool = False,
        outlier: float = OUTLIER,
        device: torch.device | None = None,
    ):
        super().__init__(in_features, out_features, bias)
        self.activations, self.outlier = activations, outlier
        self.qweight = frozen(torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.scale = frozen(torch.empty(out_features, dtype=torch.float32, device=device))

    @property
    def threshold(self) -> float | None:
        return self.outlier if self.activations else None

    @property
    def weight_view(self) -> Int8Weight:
        return Int8Weight(self.qweight, self.scale, (self.out_features, self.in_features))

    def fill(self, weight: Tensor) -> None:
        payload, scale = formats.quantise_rows(weight)
        formats.check_finite(scale)
        self.qweight, self.scale = frozen(payload), frozen(scale)


class FrozenNF4Linear(FrozenLinear):
    """W in 4 bits, a step per ``block`` weights."""

    steps = "absmax"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        *,
        block: int = formats.NF4_BLOCK,
        device: torch.device | None = None,
    ):
        super().__init__(in_features, out_features, bias)
        self.block, count = block, in_features * out_features
        self.qweight = frozen(torch.empty(-(-count // 2), dtype=torch.uint8, device=device))
        self.absmax = frozen(torch.empty(-(-count // block), dtype=torch.float32, device=device))

    @property
    def weight_view(self) -> Nf4Weight:
        return Nf4Weight(self.qweight, self.absmax, (self.out_features, self.in_features), self.block)

    def fill(self, weight: Tensor) -> None:
        payload, absmax = formats.quantise_blocks(weight, self.block)
        formats.check_finite(absmax)
        self.qweight, self.absmax = frozen(payload), frozen(absmax)


class FrozenInt8Embedding(FrozenInt8Linear):
    """Token ids (…) → (…, D) in ``dtype``; only the rows looked up become floats.

    State dict: ``qweight`` int8 (V, D), ``scale`` fp32 (V,), as those of `FrozenInt8Linear`.
    """

    def __init__(self, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device | None = None):
        super().__init__(width, vocabulary, device=device)
        self.num_embeddings, self.embedding_dim, self.dtype = vocabulary, width, dtype

    @classmethod
    def of(cls, embedding: nn.Embedding) -> Self:
        made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.weight.dtype, torch.device("meta"))
        made.fill(embedding.weight.detach())
        return made

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.qweight.data)
        return (rows.float() * self.scale.data[ids].float()[..., None]).to(self.dtype)

    def head(self, bias: nn.Parameter | None = None) -> FrozenInt8Linear:
        """The tied language head: the very same parameters, as a linear layer D → V."""
        made = FrozenInt8Linear(self.embedding_dim, self.num_embeddings, device=torch.device("meta"))
        made.qweight, made.scale = self.qweight, self.scale
        made.bias = None if bias is None else frozen(bias.detach())
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)
