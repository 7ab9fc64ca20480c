"""Momentum-distilled contrast with a queue: ITA, the contrastive loss of ALBEF, BLIP and Aurora (arXiv 2305.08381).

A slow copy of what is trained, an exponential mean over steps, makes the vectors that the trained ones are compared with.
They change slowly enough to be kept over steps, so the loss sees more wrong partners than a batch has; and what the slow
copy thinks of them softens the targets.

Shapes: B own samples, N samples of all ranks, K filled places of the queue, d width of the common space.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor, nn

from mitrain.core import dist

Vectors = tuple[Tensor, Tensor]
"""Of pictures and of texts, (B, d) each."""
Keys = Sequence[tuple[str, str]]
"""What tells a sample's picture, and its text."""


class MomentumQueue(nn.Module):
    """The slow copies θ' of ``trained`` and the queue; all are buffers, so checkpoints carry them.

        θ' ← μ θ' + (1 − μ) θ                                         μ ``momentum``, once per call of ``slow_vectors``
        q  = a softmax(s v' · C) + (1 − a) right / |right|            targets: v' the slow vector, C the candidates
        loss = −½ Σ (q log softmax(s v · C)), of both ways            s = 1 / τ, a ``distil``

    Candidates are the slow vectors of all ranks' samples and the queue's, newest ``size`` of earlier calls. Right is the
    sample's own partner and whatever shows the same picture or says the same text. ``ramp``: calls over which a rises
    linearly from 0, as the slow copy has nothing to say at first (the release: the first epoch). ``start``: the queue is
    empty at first, or full of random unit vectors that are nobody's partner, as the release has it.

    Of several ranks each computes its own samples' rows, so losses and gradients add up to those of one process; the
    queue is filled from all ranks' vectors in their order, and so is the same on each.
    """

    def __init__(
        self,
        size: int,
        width: int,
        trained: Mapping[str, nn.Module],
        momentum: float = 0.995,
        distil: float = 0.4,
        ramp: int = 0,
        start: Literal["empty", "random"] = "empty",
    ):
        super().__init__()
        self.size, self.momentum, self.distil, self.ramp = size, momentum, distil, ramp
        parameters = {f"{m}.{n}": p for m, module in trained.items() for n, p in module.named_parameters()}
        self._fast = list(parameters.values())  # in a list: they are not this module's parameters
        self._names = ["slow_" + name.replace(".", "__") for name in parameters]
        for name, parameter in zip(self._names, self._fast, strict=True):
            self.register_buffer(name, parameter.detach().clone())
        like = self._fast[0].detach()
        for name in ("images", "words"):
            table = torch.zeros(size, width, device=like.device)
            self.register_buffer(name, nn.functional.normalize(table.normal_(), dim=-1) if start == "random" else table)
        self.register_buffer("keys", torch.zeros(size, 2, dtype=torch.int64, device=like.device))
        full = size if start == "random" else 0
        self.register_buffer("pushed", torch.full((), full, dtype=torch.int64, device=like.device))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=like.device))

    @torch.no_grad()
    def follow(self) -> None:
        """Let the slow copy be what is trained now: other weights have been loaded into it."""
        for name, parameter in zip(self._names, self._fast, strict=True):
            getattr(self, name).copy_(parameter)

    @property
    def filled(self) -> int:
        """K."""
        return min(int(self.pushed), self.size)

    @property
    def softness(self) -> float:
        """a, for the present call."""
        return self.distil * (min(1.0, int(self.calls) / self.ramp) if self.ramp else 1.0)

    @torch.no_grad()
    def slow_vectors(self, compute: Callable[[], Vectors]) -> Vectors:
        """``compute()`` with the slow parameters, which take a step first (in training). Call it before the pass that
        is differentiated: that pass must not see parameters whose contents were exchanged in between."""
        if self.training:
            for name, parameter in zip(self._names, self._fast, strict=True):
                getattr(self, name).lerp_(parameter.detach(), 1 - self.momentum)
        with self._exchanged():
            images, words = compute()
        return images.detach(), words.detach()

    @contextlib.contextmanager
    def _exchanged(self) -> Iterator[None]:
        kept = [parameter.data for parameter in self._fast]
        try:
            for name, parameter in zip(self._names, self._fast, strict=True):
                parameter.data = getattr(self, name)
            yield
        finally:
            for parameter, data in zip(self._fast, kept, strict=True):
                parameter.data = data

    def contrast(self, fast: Vectors, slow: Vectors, keys: Keys, sharpness: Tensor) -> Tensor:
        """The loss summed over this rank's B samples; in training the slow vectors of all ranks then join the queue.

        fast, slow: unit vectors of the samples, the former with their gradient. sharpness: s.
        """
        device = slow[0].device
        own = torch.tensor([[number(image), number(text)] for image, text in keys], dtype=torch.int64)
        parts = dist.gather((slow[0].cpu(), slow[1].cpu(), own))
        new = [torch.cat([part[i] for part in parts]).to(device) for i in range(3)]
        kept = [table[: self.filled].to(device) for table in (self.images, self.words, self.keys)]
        images, words, known = (torch.cat(both) for both in zip(new, kept, strict=True))
        right = (own.to(device)[:, None] == known[None]).any(-1)
        ways = [
            self._cross_entropy(a, b, candidates.to(a), right, sharpness)
            for a, b, candidates in ((fast[0], slow[0], words), (fast[1], slow[1], images))
        ]
        if self.training:
            self._push(*new)
        return 0.5 * (ways[0] + ways[1]).sum()

    def _cross_entropy(self, fast: Tensor, slow: Tensor, candidates: Tensor, right: Tensor, sharpness: Tensor) -> Tensor:
        """(B,) of one way, against ``candidates`` (N + K, d) with ``right`` (B, N + K)."""
        meant = right.to(fast)
        meant = meant / meant.sum(-1, keepdim=True)
        thought = (sharpness.detach() * slow.to(fast) @ candidates.T).softmax(-1)
        target = self.softness * thought + (1 - self.softness) * meant
        return -(target * (sharpness * fast @ candidates.T).log_softmax(-1)).sum(-1)

    @torch.no_grad()
    def _push(self, images: Tensor, words: Tensor, keys: Tensor) -> None:
        count = len(keys)
        places = (self.pushed + torch.arange(count, device=self.keys.device)) % self.size
        last = slice(max(0, count - self.size), count)  # of more vectors than places the newest stay
        for table, values in ((self.images, images), (self.words, words), (self.keys, keys)):
            table[places[last]] = values[last].to(table)
        self.pushed += count
        self.calls += 1


def number(name: str) -> int:
    """A name as an integer that is the same in every process and run."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
