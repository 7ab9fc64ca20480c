"""Which sample comes next: a seeded order that can be saved as two integers.

Every random choice about a sample is drawn from (seed, epoch, position), never from a running generator, so that a
resumed run continues with exactly the choices the uninterrupted one would have made. On several ranks every rank draws
the whole batch and computes its share of it: the order does not know how many ranks there are.
"""

import random
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Draw(Generic[T]):
    """One drawn sample with a private random generator."""

    sample: T
    epoch: int
    random: random.Random


class Loader(Generic[T]):
    """Endless epochs over ``samples``, each in an order of its own; ``state()`` is the cursor.

    The last, short batch of an epoch is filled up from the next one: every batch has ``batch`` samples.
    """

    def __init__(self, samples: list[T], batch: int, seed: int):
        if not samples:
            raise ValueError("a loader needs at least one sample")
        self.samples, self.batch, self.seed = samples, batch, seed
        self.epoch, self.position = 0, 0
        self._order = self._shuffled(0)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.samples)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

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
