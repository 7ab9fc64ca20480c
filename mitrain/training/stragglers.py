"""Which rank the others wait for: the seconds that each spends before a step's collectives, and in what."""

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from mitrain.core import dist

log = logging.getLogger(__name__)

PARTS = {"input": "waiting for input", "compute": "forward and backward"}
SLOWER, TIMES, LEAST_S = 1.5, 3, 0.1
"""So many times the others' median, in so many reports in a row, and by so many seconds at least, is a straggler."""


class Pace:
    """Sums this rank's seconds by part; every ``every`` steps rank 0 compares the ranks, and names one that stays slow.

    ``lockstep``: the passes themselves hold collectives (ZeRO-3), so that all ranks take as long as the slowest; the input
    alone then tells. One process does nothing of it.
    """

    def __init__(self, every: int, lockstep: bool = False):
        self.every = every
        self.parts = ("input",) if lockstep else tuple(PARTS)
        self.hosts: list[str] = []
        self.slow: dict[int, int] = {}  # reports in a row, by rank
        self.clear()

    def clear(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[name] += time.perf_counter() - start

    def arrive(self) -> None:
        """The passes of a step are behind this rank: a GPU is waited for, as the step does next in any case."""
        if dist.world() > 1 and torch.cuda.is_available():
            with self.part("compute"):
                torch.cuda.synchronize()

    def report(self, step: int) -> None:
        """All ranks together, after ``step``."""
        if dist.world() == 1 or step % self.every:
            return
        self.hosts = self.hosts or dist.gather(socket.gethostname())
        rows = torch.zeros(dist.world(), len(self.parts), dtype=torch.float64)
        rows[dist.rank()] = torch.tensor([self.spent[name] for name in self.parts])
        self.clear()
        for line in self.stragglers(dist.sum_across(rows).tolist(), step):
            log.warning(line)  # of a rank other than 0 the log says errors alone

    def stragglers(self, rows: Sequence[Sequence[float]], step: int) -> list[str]:
        """A line for each rank that has been slow in `TIMES` reports by now; rows: seconds of each rank by part."""
        lines = []
        for rank, own in enumerate(rows):
            others = [row for other, row in enumerate(rows) if other != rank]
            usual, took = median(map(sum, others)), sum(own)
            slow = took > SLOWER * usual and took - usual > LEAST_S
            self.slow[rank] = self.slow.get(rank, 0) + 1 if slow else 0
            if self.slow[rank] == TIMES:
                lines.append(self.line(rank, own, others, step))
        return lines

    def line(self, rank: int, own: Sequence[float], others: Sequence[Sequence[float]], step: int) -> str:
        usual = [median(column) for column in zip(*others, strict=True)]
        excess = [mine - theirs for mine, theirs in zip(own, usual, strict=True)]
        part = excess.index(max(excess))
        return (
            f"rank {rank} on {self.hosts[rank]} holds the others up: {own[part]:.2f} s {PARTS[self.parts[part]]} in the"
            f" {self.every} steps to {step}, theirs is {usual[part]:.2f} s;"
            " look at what else runs there, and at its disk"
        )
