"""A frozen embedding in int8 with a step per row, and the head that shares its payload.

Shapes: V vocabulary, D hidden width.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from mitrain.models.quant.linear import FrozenInt8Linear, frozen


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
