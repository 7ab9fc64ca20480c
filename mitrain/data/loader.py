"""Which sample comes next: a seeded order that can be saved as two integers.

Every random choice about a sample is drawn from (seed, epoch, position), never from a running generator, so that a
resumed run continues with exactly the choices the uninterrupted one would have made. On several ranks every rank draws
the whole batch and computes its share of it: the order does not know how many ranks there are.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
POOL = 50  # batches whose samples are put in the order of their lengths


@dataclass(frozen=True)
class Draw(Generic[T]):
    """One drawn sample with a private random generator."""

    sample: T
    epoch: int
    random: random.Random


class Loader(Generic[T]):
    """Endless epochs over ``samples``, each in an order of its own; ``state()`` is the cursor.

    The last, short batch of an epoch is filled up from the next one: every batch has ``batch`` samples. ``lengths``: of the
    samples, if batches are to hold those of about the same length, in an order that is random all the same.
    """

    def __init__(self, samples: list[T], batch: int, seed: int, lengths: Sequence[int] | None = None):
        if not samples:
            raise ValueError("a loader needs at least one sample")
        self.samples, self.batch, self.seed, self.lengths = samples, batch, seed, lengths
        self.epoch, self.position = 0, 0
        self._order = self._shuffled(0)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.samples)))
        draw = random.Random(f"{self.seed}/{epoch}")
        draw.shuffle(order)
        return order if self.lengths is None else self._grouped(order, epoch, draw)

    def _grouped(self, order: list[int], epoch: int, draw: random.Random) -> list[int]:
        pool = self.batch * POOL
        pools = [sorted(order[start : start + pool], key=self.lengths.__getitem__) for start in range(0, len(order), pool)]
        ordered = [index for part in pools for index in part]
        cut = draw.randrange(len(ordered))  # or the ends of an epoch would always be the shortest and the longest ones
        ordered = ordered[cut:] + ordered[:cut]
        # The epoch before ends in the middle of a batch, which the first samples of this one fill up.
        first = -(epoch * len(order)) % self.batch
        batches = [ordered[i : i + self.batch] for i in range(first, len(order), self.batch)]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch else []  # and so does this one
        draw.shuffle(batches)
        return [index for part in ([ordered[:first]], batches, last) for chunk in part for index in chunk]

    def next(self) -> list[Draw[T]]:
        return [self._draw() for _ in range(self.batch)]

    def _draw(self) -> Draw[T]:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffled(self.epoch)
        index = self._order[self.position]
        self.position += 1
        return Draw(self.samples[index], self.epoch, random.Random(f"{self.seed}/{self.epoch}/{index}"))

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "samples": len(self.samples)}

    def load_state(self, state: dict[str, int], other_samples: bool = False) -> None:
        """Raises ValueError if the cursor is none, or belongs to another number of samples.

        ``other_samples``: of another number the next epoch begins.
        """
        epoch, position = state["epoch"], state["position"]
        if state["samples"] != len(self.samples) and other_samples and type(epoch) is int:
            epoch, position = epoch + 1, 0
        elif state["samples"] != len(self.samples):
            raise ValueError(f"the cursor is for {str(state['samples'])[:20]} samples, here are {len(self.samples)}")
        if any(type(value) is not int or value < 0 for value in (epoch, position)) or position > len(self.samples):
            raise ValueError(f"no cursor has epoch={str(epoch)[:20]} and position={str(position)[:20]}")
        self.epoch, self.position = epoch, position
        self._order = self._shuffled(self.epoch)
