"""Cells of tables in Parquet, and in Arrow's stream format as Hugging Face's ``save_to_disk`` writes it: extra [parquet].

A cell is addressed as ROW/COLUMN, rows counted from 0. Of Parquet a column is read by groups of rows, of which the last used
are kept (`HELD` bytes); Arrow files are mapped, and no more of them is read than is asked for.
"""

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from mitrain.core.errors import need_extra

HELD = 1 << 26  # bytes of groups of rows that are kept for the next cell, of each of the files that are open
LARGEST = 1 << 30  # bytes of a group of rows
BATCH = 1024  # rows that are read at a time
ONE_AT_A_TIME = threading.Lock()  # so that threads that want the same rows read them once


class Refused(ValueError):
    """What is wrong with a file, to be put behind its name."""


class ParquetTable:
    """A Parquet file's cells."""

    def __init__(self, path: Path):
        need_extra("pyarrow", "parquet", "reading Parquet")
        self.file = need_extra("pyarrow.parquet", "parquet", "reading Parquet").ParquetFile(path)
        self.schema, meta = self.file.schema_arrow, self.file.metadata
        self.ends = list(accumulate(meta.row_group(group).num_rows for group in range(meta.num_row_groups)))
        self.rows, self.held, self.size = meta.num_rows, {}, 0

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """The columns, some rows at a time; of a struct perhaps a field alone, as ``image.path``."""
        return self.file.iter_batches(BATCH, columns=list(columns), use_threads=False)

    def value(self, row: int, column: str) -> Any:
        group = bisect_right(self.ends, row)
        if (values := self.held.pop((group, column), None)) is None:
            if (size := self.file.metadata.row_group(group).total_byte_size) > LARGEST:
                raise Refused(f"has groups of rows of {size} bytes, {LARGEST} are allowed: write smaller ones")
            values = self.file.read_row_group(group, columns=[column], use_threads=False).column(0)
            self.size += values.nbytes
        self.held[group, column] = values  # the last used ones stand last
        while self.size > HELD and len(self.held) > 1:
            self.size -= self.held.pop(next(iter(self.held))).nbytes
        return values[row - (self.ends[group - 1] if group else 0)]


class ArrowTable:
    """The cells of a file in Arrow's stream format."""

    def __init__(self, path: Path):
        arrow = need_extra("pyarrow", "parquet", "reading Arrow files")
        with arrow.memory_map(str(path)) as file:
            self.table = arrow.ipc.open_stream(file).read_all()
        self.schema, self.rows = self.table.schema, self.table.num_rows

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """As of `ParquetTable`; structs come whole, as nothing of what is not looked at is read."""
        names = list(dict.fromkeys(name.partition(".")[0] for name in columns))
        for batch in self.table.select(names).to_batches(BATCH):
            batch.validate(full=True)
            yield batch

    def value(self, row: int, column: str) -> Any:
        part = self.table.column(column).slice(row, 1)
        part.validate(full=True)
        return part[0]


def stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def opened(path: Path) -> ParquetTable | ArrowTable:
    return opened_at(path, stamp(path))


@lru_cache(4)
def opened_at(path: Path, now: tuple[int, int, int]) -> ParquetTable | ArrowTable:
    return ParquetTable(path) if path.suffix == ".parquet" else ArrowTable(path)


def cell(path: Path, place: str | None, key: str | None = None) -> Any:
    """The Arrow scalar at ROW/COLUMN; where no column is named, in that of ``key``, or in the only one of lists."""
    if place is None:
        raise Refused("is a table: name a row of it behind #")
    row, _, column = place.partition("/")
    with ONE_AT_A_TIME:
        table = opened(path)
        names = table.schema.names
        if not (column or key):
            lists = [field.name for field in table.schema if is_list(field.type)]
            column, _ = name_of(lists, None, None, "column of list")
        elif (column := column or key) not in names:
            raise Refused(f"has the columns {', '.join(map(repr, names[:5]))}, not {column[:80]!r}")
        return table.value(row_of(row, table.rows), column)


def content(path: Path, place: str, most: int) -> bytes | str:
    """The bytes in a cell; the path of a file where {"bytes", "path"} has no bytes."""
    value = cell(path, place)
    kind, found = str(value.type), value.as_py() if is_content(value.type) else None
    if isinstance(found, dict):
        found = found["path"] if found["bytes"] is None else found["bytes"]
    if found is None:
        raise Refused("is empty (null)" if is_content(value.type) else f"holds {kind[:80]}, and no file's bytes")
    if len(found) > most:
        raise Refused(f"has {len(found)} bytes, {most} are allowed: leave it out")
    return found


def is_content(kind: Any) -> bool:
    """Whether cells of this Arrow type hold the bytes of a file."""
    return str(kind) in ("binary", "large_binary") or (
        str(kind).startswith("struct<") and {field.name for field in kind} >= {"bytes", "path"}
    )


def is_list(kind: Any) -> bool:
    return str(kind).startswith(("list<", "large_list<", "fixed_size_list<"))


def row_of(place: str | None, rows: int) -> int | None:
    """The number of the row that ``place`` names; None for none."""
    if place is None:
        return None
    if not place.isdecimal() or int(place) >= rows:
        raise Refused(f"names the row {place[:40]!r}, and there are the rows 0 to {rows - 1}: correct it")
    return int(place)


def name_of(names: list[str], place: str | None, key: str | None, what: str) -> tuple[str, str | None]:
    """Which of the ``names`` in a file is meant, and the place in it that is left to say."""
    name, left = (key, place) if key is not None else (place, None)
    if name is None and len(names) == 1:
        return names[0], left
    if name not in names:
        shown = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
        raise Refused(f"has the {what}s {shown}" + (f", not {name[:80]!r}" if name else ": name one behind #"))
    return name, left
