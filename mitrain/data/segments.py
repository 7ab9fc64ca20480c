"""A segment of the feature cache: the rows of many items, one file an array, and an index that says what is where.

    index.json     item key → [checksum, {array: [first byte, rows, width]}]
    <array>.npy    the rows of all the items that have this array, one item after another

The checksum covers an item's key, what its arrays are and all their rows, so that damaged, moved and exchanged rows are
noticed alike. It is crc32: the folder is the user's own, so accidents are what it is for; it is in the standard library;
and at 1 to 2 GB/s it adds about a tenth to the gathering of a batch, so that every read is checked, not the first alone.

Files are not mapped: one that is cut while it is mapped ends the process by SIGBUS. Read by position it comes out short,
an error like any other, and no more is in memory than was asked for.
"""

import os
import weakref
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mitrain.core.files import write_json

OPEN_FILES = 64  # held open at most: a large cache has more files than a process may open

Item = dict[str, np.ndarray]
Index = dict[str, list[Any]]


def write_segment(folder: Path, items: Mapping[str, Item]) -> Index:
    """Write ``items`` into an empty folder; returns their index."""
    index: Index = {key: [checksum(key, item), {}] for key, item in items.items()}
    for name in sorted({name for item in items.values() for name in item}):
        having = {key: item[name] for key, item in items.items() if name in item}
        # Of transposed arrays, as a convolution's output is, concatenate makes another: a file of columns.
        rows = np.ascontiguousarray(np.concatenate(list(having.values())))
        np.save(folder / f"{name}.npy", rows, allow_pickle=False)
        place = (folder / f"{name}.npy").stat().st_size - rows.nbytes
        for key, array in having.items():
            index[key][1][name] = [place, *array.shape]
            place += array.nbytes
    write_json(folder / "index.json", index)
    return index


def read_item(folder: Path, key: str, entry: Any, dtypes: Mapping[str, np.dtype]) -> Item:
    """The item that ``entry`` of the index places, as it was written; OSError or ValueError where it is not there."""
    try:
        expected, places = entry
        spans = {name: (dtypes[name], *(size(number) for number in place)) for name, place in places.items()}
        item = {name: read_rows(folder / f"{name}.npy", *span) for name, span in spans.items()}
    except (TypeError, KeyError, AttributeError):
        raise ValueError("its index makes no sense") from None
    if checksum(key, item) != expected:
        raise ValueError("its rows are not as they were written")
    return item


def size(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise TypeError("no size")
    return number


def read_rows(path: Path, dtype: np.dtype, first: int, rows: int, width: int) -> np.ndarray:
    """(rows, width) from the byte ``first`` on."""
    return np.frombuffer(opened(path).read(first, rows * width * dtype.itemsize), dtype).reshape(rows, width)


def checksum(key: str, item: Item) -> int:
    total = zlib.crc32(key.encode())
    for name in sorted(item):
        total = zlib.crc32(f" {name} {item[name].dtype.str} {item[name].shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(item[name]), total)
    return total


class OpenFile:
    """A file to read from by position, by any number of threads; closed when nobody holds it any more.

    That may be after others have taken its place among the open ones: a thread may still be reading from it.
    """

    def __init__(self, path: Path):
        self.descriptor, self.name = os.open(path, os.O_RDONLY), path.name
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, first: int, count: int) -> bytes:
        """``count`` bytes from the byte ``first`` on; ValueError where the file is shorter, now or meanwhile."""
        if first + count <= os.fstat(self.descriptor).st_size:  # before memory is taken for what an index claims
            content = os.pread(self.descriptor, count, first)
            while len(content) < count and (more := os.pread(self.descriptor, count - len(content), first + len(content))):
                content += more
            if len(content) == count:
                return content
        raise ValueError(f"{self.name} is shorter than its index says")


opened = lru_cache(maxsize=OPEN_FILES)(OpenFile)
