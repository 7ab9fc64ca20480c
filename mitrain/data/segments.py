"""A segment of the feature cache: the rows of many items, one file an array, and an index that says what is where.

    index.bin      a table of NumPy: a digest of each item's key, a checksum, of each array the first byte, rows and width,
                   -1 where the item has none; behind it crc32 of all before
    <array>.npy    the rows of all the items that have this array, one item after another

The checksum covers an item's key, what its arrays are and all their rows, so that damaged, moved and exchanged rows are
noticed alike. It is crc32: the folder is the user's own, so accidents are what it is for; it is in the standard library;
and at 1 to 2 GB/s it adds about a tenth to the gathering of a batch, so that every read is checked, not the first alone.

Files are not mapped: one that is cut while it is mapped ends the process by SIGBUS. Read by position it comes out short,
an error like any other, and no more is in memory than was asked for.
"""

import hashlib
import io
import os
import weakref
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from mitrain.core.files import write_atomic

OPEN_FILES = 64  # held open at most: a large cache has more files than a process may open

Item = dict[str, np.ndarray]
Places = dict[str, tuple[int, dict[str, list[int]]]]
INDEX = "index.bin"
CRC = 4  # bytes
PARTS, NONE = ("first", "rows", "width"), (-1, 0, 0)


def key_of(key: str) -> bytes:
    """What stands for an item's key in an index; the checksum has the key itself."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def keys_in(index: np.ndarray) -> list[bytes]:
    """As `key_of`, in the index's order."""
    whole, size = index["key"].tobytes(), index["key"].itemsize
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def write_segment(folder: Path, items: Mapping[str, Item]) -> np.ndarray:
    """Write ``items`` into an empty folder; returns their index."""
    places: Places = {key: (checksum(key, item), {}) for key, item in items.items()}
    for name in sorted({name for item in items.values() for name in item}):
        having = {key: item[name] for key, item in items.items() if name in item}
        # Of transposed arrays, as a convolution's output is, concatenate makes another: a file of columns.
        rows = np.ascontiguousarray(np.concatenate(list(having.values())))
        np.save(folder / f"{name}.npy", rows, allow_pickle=False)
        place = (folder / f"{name}.npy").stat().st_size - rows.nbytes
        for key, array in having.items():
            places[key][1][name] = [place, *array.shape]
            place += array.nbytes
    index = index_of(places)
    with io.BytesIO() as file:
        np.save(file, index, allow_pickle=False)
        content = file.getvalue()
    write_atomic(folder / INDEX, content + zlib.crc32(content).to_bytes(CRC, "little"))
    return index


def index_of(places: Places) -> np.ndarray:
    """The table of ``places``, three columns an array."""
    names = sorted({name for _, own in places.values() for name in own})
    columns = [(f"{part} {name}", "<i8") for name in names for part in PARTS]
    table = np.zeros(len(places), [("key", "V16"), ("sum", "<u4"), *columns])
    table["key"] = np.frombuffer(b"".join(map(key_of, places)), "V16")
    table["sum"] = [total for total, _ in places.values()]
    for name in names:
        for part, numbers in zip(PARTS, zip(*(own.get(name, NONE) for _, own in places.values()), strict=True), strict=True):
            table[f"{part} {name}"] = numbers
    return table


def read_index(segment: Path) -> np.ndarray:
    """OSError or ValueError where there is none, or none that is whole."""
    content = (segment / INDEX).read_bytes()
    if zlib.crc32(content[:-CRC]).to_bytes(CRC, "little") != content[-CRC:]:
        raise ValueError("its index is not as it was written")
    return np.load(io.BytesIO(content[:-CRC]), allow_pickle=False)


def read_item(folder: Path, key: str, entry: np.void, dtypes: Mapping[str, np.dtype]) -> Item:
    """The item that ``entry`` of the index places, as it was written; OSError or ValueError where it is not there."""
    _, total, *numbers = entry.tolist()
    names = [column.partition(" ")[2] for column in entry.dtype.names[2 :: len(PARTS)]]
    places = {n: numbers[i : i + 3] for n, i in zip(names, range(0, len(numbers), 3), strict=True) if numbers[i] >= 0}
    if not places.keys() <= dtypes.keys() or any(number < 0 for place in places.values() for number in place):
        raise ValueError("its index makes no sense")
    item = {name: read_rows(folder / f"{name}.npy", dtypes[name], *place) for name, place in places.items()}
    if checksum(key, item) != total:
        raise ValueError("its rows are not as they were written")
    return item


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
