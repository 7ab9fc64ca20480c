"""Cross-entropy of a frozen head over a large vocabulary, a part of the vocabulary at a time.

    loss_n = log Σ_v exp(h · w_v + b_v) − (h · w_y + b_y),    y = label_n, h = h_n, or h_row(n) where labels share some
    d loss_n / d h = Σ_v p_v w_v − w_y,                       p_v = exp(h · w_v + b_v) / Σ

Both sums run over parts with a running maximum, in one pass, as attention's softmax does in FlashAttention (arXiv
2205.14135): no (N, V) logits exist, and each is made once. The head is frozen, so that its own gradient is not asked for.
Shapes: N positions, n labels (N of them, each of its own position, without ``rows``), D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.core.errors import ModelError
from mitrain.models.quant import FrozenLinear
from mitrain.models.quant.weights import Weight, compute_dtype

CHUNK = 4096
IGNORED = -100


@dataclass(frozen=True)
class DenseWeight:
    """A frozen float matrix (out, in) with the interface of the low-bit ones."""

    weight: nn.Parameter
    shape: tuple[int, int]
    block = 1

    def rows(self, part: slice, dtype: torch.dtype) -> tuple[Tensor, None]:
        return self.weight.data[part].to(dtype), None


@dataclass(frozen=True)
class Head:
    """A frozen language head, its logits a part of the vocabulary at a time."""

    weight: Weight | DenseWeight
    bias: nn.Parameter | None
    chunk: int

    def parts(self, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first token, its float rows W (c, D), logits (N, c) in fp32 at least), part after part."""
        dtype = compute_dtype(hidden)
        step = -(-self.chunk // self.weight.block) * self.weight.block
        for start in range(0, self.weight.shape[0], step):
            part = slice(start, min(start + step, self.weight.shape[0]))
            rows, factor = self.weight.rows(part, dtype)
            rows = rows if factor is None else rows.mul_(factor[:, None])
            logits = hidden.to(dtype) @ rows.t()
            if self.bias is not None:
                logits += self.bias.data[part]
            yield start, rows, logits.to(torch.promote_types(dtype, torch.float32))


class ChunkedCrossEntropy(torch.autograd.Function):
    """hidden (N, D), labels (n,), their positions rows (n,) → (n,) losses; keeps their slopes (n, D) for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, rows: Tensor, head: Head) -> Tensor:
        wide, slopes = torch.promote_types(hidden.dtype, torch.float32), ctx.needs_input_grad[0]
        largest = torch.full(hidden.shape[:1], -torch.inf, dtype=wide, device=hidden.device)
        total, picked = torch.zeros_like(largest), torch.zeros(labels.shape, dtype=wide, device=hidden.device)
        if slopes:
            mean, own = torch.zeros_like(hidden, dtype=wide), picked.new_zeros(len(labels), hidden.shape[1])
        for start, weights, logits in head.parts(hidden):
            here, column = inside(labels, start, logits.shape[1])
            picked += torch.where(here, logits[rows, column], 0)
            new = torch.maximum(largest, logits.amax(1))
            shrunk, shares = (largest - new).exp(), logits.sub_(new[:, None]).exp_()
            total, largest = total * shrunk + shares.sum(1), new
            if slopes:
                mean = mean * shrunk[:, None] + shares.to(weights.dtype) @ weights
                own += torch.where(here[:, None], weights[column], 0)
        log_sum, counts = largest + total.log(), labels != IGNORED
        if slopes:
            ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
            ctx.save_for_backward(rows, torch.where(counts[:, None], (mean / total[:, None])[rows] - own, 0))
        return torch.where(counts, log_sum[rows] - picked, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, slopes = ctx.saved_tensors
        return slopes.new_zeros(ctx.shape).index_add_(0, rows, grad[:, None] * slopes).to(ctx.dtype), None, None, None


def is_trained(head: nn.Module) -> bool:
    """Whether its own gradient is asked for, as full fine-tuning does where the head's matrix is that of the embeddings."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())


def inside(labels: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in the part (N,) bool, and their column in it (0 for the others)."""
    column = labels - start
    here = (column >= 0) & (column < length)
    return here, column.where(here, 0)


def chunked_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int = CHUNK, rows: Tensor | None = None
) -> Tensor:
    """(n,) losses of hidden (N, D) under a frozen linear ``head``; labels (n,), −100 where a position does not count.

    ``rows`` (n,): the position of each label, where several share one, whose logits are made once. At most ``chunk`` tokens'
    logits exist at a time. It runs as a call of ``head``, so that hooks which bring the head's weights (ZeRO-3) find it.
    """
    if not isinstance(head, nn.Linear | FrozenLinear) or is_trained(head):
        raise ModelError(f"the chunked loss needs a frozen linear head, not {type(head).__name__}: freeze it")

    def loss(hidden: Tensor) -> Tensor:
        if isinstance(head, FrozenLinear):
            weight: Weight | DenseWeight = head.weight_view
        else:
            weight = DenseWeight(head.weight, (head.out_features, head.in_features))
        places = torch.arange(len(labels), device=labels.device) if rows is None else rows
        return ChunkedCrossEntropy.apply(hidden, labels, places, Head(weight, head.bias, chunk))

    with called_as(head, loss):
        return head(hidden)


@contextmanager
def called_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a call of ``module`` is one of another ``forward`` function; its hooks run."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
