"""Cross-entropy of a frozen head over a large vocabulary, a part of the vocabulary at a time.

    loss_n = log Σ_v exp(h_n · w_v + b_v) − (h_n · w_y + b_y),    y = label_n

The sum runs over parts with a running maximum, so no (N, V) logits exist; the backward pass makes each part's logits
again. Shapes: N positions, D hidden width, V vocabulary.
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

CHUNK = 8192
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
    """hidden (N, D), labels (N,) → (N,) losses; keeps hidden, labels and log-sums (N,) for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        largest = torch.full(labels.shape, -torch.inf, dtype=wide, device=hidden.device)
        total, picked = torch.zeros_like(largest), torch.zeros_like(largest)
        for start, _, logits in head.parts(hidden):
            new = torch.maximum(largest, logits.amax(1))
            total = total * (largest - new).exp() + (logits - new[:, None]).exp_().sum(1)
            largest = new
            here, column = inside(labels, start, logits.shape[1])
            picked += torch.where(here, logits.gather(1, column[:, None])[:, 0], 0)
        log_sum = largest + total.log()
        ctx.head = head
        ctx.save_for_backward(hidden, labels, log_sum)
        return torch.where(labels == IGNORED, 0, log_sum - picked)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        hidden, labels, log_sum = ctx.saved_tensors
        grad = torch.where(labels == IGNORED, 0, grad)
        out = torch.zeros(hidden.shape, dtype=log_sum.dtype, device=hidden.device)
        for start, rows, logits in ctx.head.parts(hidden):
            slope = logits.sub_(log_sum[:, None]).exp_()
            here, column = inside(labels, start, slope.shape[1])
            slope.scatter_add_(1, column[:, None], -here.to(slope.dtype)[:, None])
            out += slope.mul_(grad[:, None]).to(rows.dtype) @ rows
        return out.to(hidden.dtype), None, None


def inside(labels: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in the part (N,) bool, and their column in it (0 for the others)."""
    column = labels - start
    here = (column >= 0) & (column < length)
    return here, column.where(here, 0)


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """(N,) losses of hidden (N, D) under a frozen linear ``head``; labels (N,), −100 where a position does not count.

    At most ``chunk`` tokens' logits exist at a time. It runs as a call of ``head``, so that hooks which bring the
    head's weights (ZeRO-3) find it.
    """
    if not isinstance(head, nn.Linear | FrozenLinear) or any(p.requires_grad for p in head.parameters()):
        raise ModelError(f"the chunked loss needs a frozen linear head, not {type(head).__name__}: freeze it")

    def loss(hidden: Tensor) -> Tensor:
        if isinstance(head, FrozenLinear):
            weight: Weight | DenseWeight = head.weight_view
        else:
            weight = DenseWeight(head.weight, (head.out_features, head.in_features))
        return ChunkedCrossEntropy.apply(hidden, labels, Head(weight, head.bias, chunk))

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
