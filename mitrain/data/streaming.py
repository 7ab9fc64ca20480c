"""Training samples of which a block alone is in memory, in a seeded order that can be saved as a few integers.

An epoch takes the files in an order of its own. Their records, one file's after another's, are cut into blocks of so many,
and each block is shuffled: what comes next follows from (seed, epoch, file, record) and nothing else, on any number of
ranks. Every rank reads the records; the files that a block names are looked at by one rank each, and encoded by the rank
that trains on them.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mitrain.core.config import digest
from mitrain.core.errors import DataError
from mitrain.data.formats.manifest import Block, Manifest, blocks_in
from mitrain.data.loader import Draw

Place = tuple[int, int]  # a file by its number in the epoch's order, a record of it


class Stream(Manifest):
    """The records of ``source`` in the order of ``files``, of which ``blocks`` gives the next ``count``, from ``at`` on.

    ``at`` is the place of the next record, None where there is none. ``checks_columns``: see `read_blocks`.
    """

    def __init__(self, source: Manifest, files: Sequence[Path], count: int, at: Place = (0, 0), checks: bool = False):
        super().__init__(source.root, source.file)
        self.order, self.count, self.checks_columns = files, count, checks
        self.at: Place | None = at
        self._coming: Iterator[tuple[Place, Block]] | None = None
        self._next: tuple[Place, Block] | None = None

    def blocks(self, columns: Mapping[str, str], required: Sequence[str], inputs: Sequence[str]) -> Iterator[Block]:
        if self._coming is None:
            self._coming = self._all(columns, required, inputs)
            self._next = next(self._coming, None)
        left = self.count
        while left and self._next is not None:
            (number, record), block = self._next
            yield (part := block.cut(0, left))
            left -= len(part)
            rest = (number, record + len(part)), block.cut(len(part))
            self._next = rest if rest[1] else next(self._coming, None)
        self.at = self._next[0] if self._next else None

    def _all(self, *asked: Any) -> Iterator[tuple[Place, Block]]:
        first, skipped = self.at
        for number in range(first, len(self.order)):
            record = 0
            for block in blocks_in(self.order[number], self.root, *asked):
                start = max(0, skipped - record) if number == first else 0
                if start < len(block):
                    yield (number, record + start), block.cut(start)
                record += len(block)


class StreamLoader:
    """Endless epochs over ``source``, as `mitrain.data.loader.Loader`; ``state()`` is the cursor.

    ``read`` gives the samples of a block of ``buffer`` records, ``usable`` those of them that can be used, on all ranks the
    same. Ids are unique within a block.
    """

    def __init__(
        self,
        source: Manifest,
        buffer: int,
        read: Callable[[Manifest], list[Any]],
        usable: Callable[[list[Any]], list[Any]],
        batch: int,
        seed: int,
    ):
        self.source, self.buffer, self.read, self.usable = source, buffer, read, usable
        self.batch, self.seed, self.files = batch, seed, source.files()
        self._start(0, (0, 0))

    def _start(self, epoch: int, at: Place) -> None:
        order = list(self.files)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        self.epoch, self.stream = epoch, Stream(self.source, order, self.buffer, at)
        self._advance()

    def _advance(self) -> None:
        """Read the next block, of the next epoch where this one is through."""
        self.position, self.at = 0, self.stream.at
        samples = list(self.read(self.stream))
        random.Random(f"{self.seed}/{self.epoch}/{self.at}").shuffle(samples)
        self.block = self.usable(samples) if samples else []

    def next(self) -> list[Draw[Any]]:
        return [self._draw() for _ in range(self.batch)]

    def _draw(self) -> Draw[Any]:
        before = self.epoch
        while self.position == len(self.block):
            if self.epoch > before + 1:
                raise DataError(f"no sample of {str(self.source)!r} can be used: correct data.splits, or its records")
            if self.stream.at is None:
                self._start(self.epoch + 1, (0, 0))
            else:
                self._advance()
        index = self.position
        self.position += 1
        choices = random.Random(f"{self.seed}/{self.epoch}/{self.at}/{index}")
        return Draw(self.block[index], self.epoch, choices)

    def state(self) -> dict[str, Any]:
        file, record = self.at
        cursor = {"epoch": self.epoch, "file": file, "record": record, "position": self.position}
        return {**cursor, "block": digest([repr(sample) for sample in self.block])}

    def load_state(self, state: dict[str, Any], other_samples: bool = False) -> None:
        """Raises ValueError if the cursor is none, or its block holds other samples here.

        ``other_samples``: where it does, the next epoch begins.
        """
        names = ("epoch", "file", "record", "position")
        epoch, file, record, position = numbers = [state[name] for name in names]
        if any(type(value) is not int or value < 0 for value in numbers) or file >= len(self.files):
            raise ValueError(f"no cursor has {', '.join(f'{n}={str(state[n])[:20]}' for n in names)}")
        try:
            self._start(epoch, (file, record))
            same = self.state()["block"] == state["block"] and position <= len(self.block)
        except DataError:
            same = False
            if not other_samples:
                raise
        if same:
            self.position = position
        elif other_samples:
            self._start(epoch + 1, (0, 0))
        else:
            raise ValueError(f"the records from {record} of {self.stream.order[file].name} on are not those that it read")
