"""Samples of many rows, most of them copied from one before: of a million rows few differ in more than plain texts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.columns import Columns
from mitrain.data.formats.manifest import Block, Manifest, Row, read_blocks
from mitrain.data.formats.rows import CONTROL, require_new

MOST = 100_000  # different rows that samples are copied from
HASHED = {str, int, type(None), type(...)}

Placed = Callable[[Iterable[Row]], Iterator[tuple[str, Any]]]
Taken = Callable[[Sequence[Any]], Sequence[Any] | None]
"""What a field's samples have of a column's cells; None where `Placed` is to look at each of these."""


class Alike:
    """What ``placed`` makes of rows: samples with an id each. DataError where two have one id.

    Rows whose other cells are the same give samples that differ in their id, their ``inputs`` and the fields ``own`` alone,
    which are made of a cell each. ``columns`` maps fields and inputs to the cells' names.
    """

    def __init__(self, placed: Placed, columns: Mapping[str, str], inputs: Sequence[str], own: Mapping[str, Taken]):
        self.placed, self.columns, self.own = placed, columns, {**own, **dict.fromkeys(inputs, filled)}
        self.inputs, self.rest = inputs, [n for f, n in columns.items() if f not in self.own and f != "id"]
        self.known: dict[Any, tuple[Any, int]] = {}
        self.made, self.ids = Columns(), set[str]()

    def samples(self, source: Manifest, required: Sequence[str]) -> Sequence[Any]:
        """Those of all records of ``source`` (`Columns.settled`), in whose header the inputs and the fields ``required``
        must stand; DataError where there are none."""
        for block in read_blocks(source, self.columns, (*self.inputs, *required), self.inputs):
            if not self._copied(block):
                samples = []
                for where, sample in self.placed(block.rows()):
                    require_new(sample.id, self.ids, where)
                    samples.append(sample)
                self.made.extend(samples)
        if not (found := self.made.settled()):
            raise DataError(f"{str(source)!r} holds no records: give one JSON object or CSV row a line")
        return found

    def _copied(self, block: Block) -> bool:
        """Whether the samples of ``block`` could be made from those of rows before."""
        values = {field: self._of(field, block) for field in ("id", *self.own)}
        if None in values.values():
            return False
        ids = values.pop("id")
        if "" in ids:
            ids = [own or block.name_of(number) for number, own in enumerate(ids)]
        if len(set(ids)) < len(ids) or not self.ids.isdisjoint(ids):
            return False
        # By columns: of a million rows the calls for each would be a third of the reading.
        rest = [same([row.get(name, ...) for row in block.cells]) for name in self.rest]
        keys = list(zip(*rest, strict=True)) if rest else [()] * len(block)
        like = [self.known.get(key) or self._like(key, block, number) for number, key in enumerate(keys)]
        if None in like:
            return False
        self.ids.update(ids)
        paths = {name: values.pop(name) for name in self.inputs}
        self.made.extend([sample for sample, _ in like], [number for _, number in like], {"id": ids, **values}, paths)
        return True

    def _of(self, field: str, block: Block) -> Sequence[Any] | None:
        name, taken = self.columns[field], self.own.get(field, clean)
        if taken is clean and name not in block.columns:
            return [""] * len(block)
        return taken([row.get(name) for row in block.cells])

    def _like(self, key: tuple[Any, ...], block: Block, number: int) -> tuple[Any, int] | None:
        """A sample that the row's differs from in nothing but what is its own, and the number of what they share."""
        found = self.known.get(key)
        if found is None and None not in key and len(self.known) < MOST:
            try:
                several = list(self.placed([block.row(number)]))
            except DataError:  # there may be another fault before it
                return None
            if len(several) == 1:
                found = self.known[key] = (several[0][1], self.made.number(several[0][1]))
        return found


def same(cells: Sequence[Any]) -> list[Any]:
    """What is the same of cells that mean the same, ... where there is none; None of those that are looked at one by one."""
    typed = list(zip(map(type, cells), cells, strict=True))
    if HASHED.issuperset(map(type, cells)):
        return typed
    texts = lambda cell: type(cell) is list and all(type(item) is str for item in cell)  # noqa: E731
    return [(kind, cell) if kind in HASHED else tuple(cell) if texts(cell) else None for kind, cell in typed]


def clean(cells: Sequence[Any]) -> Sequence[str] | None:
    """`as_text` of cells that are texts and empty ones, of which nothing is wrong with any; else None."""
    try:
        texts = ["" if cell is None else cell for cell in cells] if None in cells else cells
        whole = "".join(texts)
    except TypeError:
        return None
    return None if not whole.isprintable() and CONTROL.search(whole) else list(map(str.strip, texts))


def filled(cells: Sequence[Any], refused: Iterable[str] = ()) -> Sequence[str] | None:
    """`clean`, where none is empty, nor ``refused``."""
    texts = clean(cells)
    return None if texts is None or not {"", *refused}.isdisjoint(texts) else texts
