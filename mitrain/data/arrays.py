"""Arrays of one's own, as features made by other programs: .npy, .npz, .safetensors, a column of Parquet; MMSA's pickles.

A sample names its file and, behind ``#``, where in it: a row of an .npy or of a Parquet column, an array of an .npz or
.safetensors, a member of a tar archive; with ``key``, which names the array or column for all samples, a row of that. Only
what is named is read.
Numbers alone are: a pickle is never run (`mitrain.data.formats.pickles`), and an array of pickled objects is refused.
"""

import functools
import hashlib
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import safe_open

from mitrain.core.errors import DataError, UserError
from mitrain.data.contents import ADDRESS, contained, container, part_of
from mitrain.data.formats.pickles import read_arrays
from mitrain.data.images import Facts
from mitrain.data.tables import ONE_AT_A_TIME, Refused, cell, name_of, row_of, stamp

MAX_NUMBERS = 1 << 26  # of a sample
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
PICKLE = b"\x80"


@dataclass(frozen=True, kw_only=True)
class Array(Facts):
    """``values``: (T, e), or (e,) float32, finite. ``digest``: sha256 of its shape and numbers, not of its file's bytes:
    which array of a file is meant ``key`` may say, so that no index by the file's times holds it. ``stored_size``: (T, e).
    """

    values: np.ndarray


def read_array(
    root: Path, relative: str, key: str | None = None, width: int | None = None, numbers: int = MAX_NUMBERS
) -> Array:
    """The array that ``relative`` names, below ``root``; ``width``: the e that it must have.

    Raises DataError, naming the file, where its path leads out of ``root``, where it is missing, torn, or of no kind that is
    read, where the array is no (T, e) or (e,) of at most so many finite ``numbers``, or holds anything else.
    """
    if not isinstance(relative, str):
        raise DataError(f"{str(relative)[:80]!r} is no path of an array in {str(root)!r}: correct it")
    part = ADDRESS.fullmatch(relative)
    file, mark, place = (part[1], "#", part[2]) if part else relative.rpartition("#")
    addressed = mark and Path(file).suffix in READERS
    find = container if part else contained
    path, where = find(root, file if addressed else relative, "array"), f"{relative!r} in {str(root)!r}"
    try:
        if path.suffix not in READERS:
            raise Refused(f"is of no kind that is read: save it as {', '.join(READERS)}")
        found = READERS[path.suffix](path, place if addressed else None, key, numbers)
        values = checked(found, width)
    except Refused as error:
        raise DataError(f"{where} {error}") from None
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds for what is torn or hostile
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{where} is no readable {path.suffix} file ({reason}): write it again") from None
    digest = hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()
    size = (values.size // values.shape[-1], values.shape[-1])
    return Array(digest=digest, stored_size=size, where=where, values=values)


def checked(values: np.ndarray, width: int | None) -> np.ndarray:
    """(T, e) or (e,) float32."""
    if values.ndim not in (1, 2) or not values.size:
        raise Refused(f"has shape {values.shape}, not (e,) or (T, e): pool or reshape it")
    if width is not None and values.shape[-1] != width:
        raise Refused(f"has {values.shape[-1]} numbers in a row, not width={width}: correct one of them")
    with np.errstate(over="ignore"):
        found = np.array(values, np.float32, order="C")
    if not np.isfinite(found).all():
        at = [int(i) for i in np.argwhere(~np.isfinite(found))[0]]
        raise Refused(
            f"holds {values[tuple(at)]} at {at}, no finite number of 32 bits: correct it, or leave the sample's input out"
        )
    return found


def check_count(shape: tuple[int, ...], numbers: int) -> None:
    if math.prod(shape) > numbers or min(shape, default=0) < 0:
        raise Refused(f"has shape {shape}, {numbers} numbers are allowed: pool it")


def npy(path: Path, place: str | None, key: str | None, numbers: int) -> np.ndarray:
    with open(path, "rb") as file:
        return npy_in(file, place, numbers)


def npy_in(file: BinaryIO, place: str | None, numbers: int) -> np.ndarray:
    """The array, or one row of it, in an open .npy file."""
    start = file.read(6)
    if start[:1] == PICKLE:
        raise Refused("is a pickle, which could run anything and is never read: save it with numpy.save")
    file.seek(0)
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise Refused(f"is an .npy file of version {version}, which no array of plain numbers needs: save it again")
    shape, fortran, dtype = HEADERS[version](file)
    if dtype.hasobject or dtype.kind not in "fiu":
        raise Refused(f"holds {'pickled objects' if dtype.hasobject else dtype}, and numbers alone are read: save those")
    row = row_of(place, shape[0] if shape else 0)
    part = shape if row is None or fortran else shape[1:]
    check_count(part, numbers)
    size = math.prod(part) * dtype.itemsize
    file.seek(0 if row is None or fortran else row * size, io.SEEK_CUR)
    content = file.read(size)
    if len(content) < size:
        raise Refused(f"is torn ({len(content)} of {size} bytes are there): write it again")
    values = np.frombuffer(content, dtype).reshape(part, order="F" if fortran else "C")
    return values[row] if row is not None and fortran else values


def npz(path: Path, place: str | None, key: str | None, numbers: int) -> np.ndarray:
    return npz_in(opened_zip(path, stamp(path)), place, key, numbers)


def npz_in(archive: zipfile.ZipFile, place: str | None, key: str | None, numbers: int) -> np.ndarray:
    names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    name, left = name_of(names, place, key, "array")
    with archive.open(f"{name}.npy") as file:
        return npy_in(file, left, numbers)


def safetensors(path: Path, place: str | None, key: str | None, numbers: int) -> np.ndarray:
    file, names = opened_safetensors(path, stamp(path))
    name, left = name_of(names, place, key, "tensor")
    part = file.get_slice(name)
    shape = tuple(part.get_shape())
    row = row_of(left, shape[0] if shape else 0)
    check_count(shape if row is None else shape[1:], numbers)
    if not part.get_dtype().startswith(("F", "BF", "I", "U")):
        raise Refused(f"holds {part.get_dtype()}, and numbers alone are read: save those")
    return (file.get_tensor(name) if row is None else part[row]).float().numpy()


def table(path: Path, place: str | None, key: str | None, numbers: int) -> np.ndarray:
    return of_arrow(cell(path, place, key), numbers)


def member(path: Path, place: str | None, key: str | None, numbers: int) -> np.ndarray:
    """The array in a member of an archive, which ``place`` names (`mitrain.data.contents`)."""
    content = io.BytesIO(part_of(path, place or ""))
    return npz_in(zipfile.ZipFile(content), None, key, numbers) if place.endswith(".npz") else npy_in(content, None, numbers)


def of_arrow(value: Any, numbers: int) -> np.ndarray:
    """A list of numbers (e,), or a list of lists of equal length (T, e)."""
    if not value.is_valid:
        raise Refused("is empty (null): leave the sample's input out")
    values, rows = value.values, None
    if hasattr(values.type, "value_type"):
        lengths = {len(part) if part.is_valid else None for part in values}
        if len(lengths) != 1 or None in lengths:
            raise Refused("holds lists of several lengths, or an empty one: make them rows of one length")
        rows, values = len(values), values.flatten()
    check_count((len(values),), numbers)
    if values.null_count:
        raise Refused("holds an empty number (null): correct it")
    found = values.to_numpy(zero_copy_only=False)
    if found.dtype.kind not in "fiu":
        raise Refused(f"holds {values.type}, and numbers alone are read: save those")
    return found if rows is None else found.reshape(rows, -1)


def mmsa(path: Path, place: str | None, key: str | None, numbers: int) -> np.ndarray:
    """The rows of one clip, which ``place`` names: SPLIT/MODALITY/NUMBER (`mitrain.data.formats.mmsa`)."""
    split, _, left = (place or "").partition("/")
    modality, _, row = left.partition("/")
    with ONE_AT_A_TIME:
        part = opened_pickle(path, stamp(path)).get(split)
    arrays = part.get(modality) if isinstance(part, dict) else None
    if not isinstance(arrays, np.ndarray) or arrays.ndim != 3 or arrays.dtype.kind not in "fiu":
        raise Refused(f"has no arrays {place!r}: name them as SPLIT/MODALITY/NUMBER behind #")
    check_count(arrays.shape[1:], numbers)
    return clip(arrays[row_of(row, len(arrays))], part.get(f"{modality}_lengths"), int(row))


def clip(rows: np.ndarray, lengths: Any, number: int) -> np.ndarray:
    """(T, e): the ``rows`` of a clip without its padding, which are those beyond its length, or where no ``lengths`` are
    told those of zeros at both ends; at least one stays. −∞, COVAREP's logarithm of silence, becomes 0."""
    if lengths is not None:
        length = int(lengths[number])
        if not 0 <= length <= len(rows):
            raise Refused(f"says that clip {number} has {length} of {len(rows)} rows: get the original file")
        rows = rows[: max(1, length)]
    elif (filled := np.flatnonzero(rows.any(1))).size:
        rows = rows[filled[0] : filled[-1] + 1]
    else:
        rows = rows[:1]
    return np.where(np.isneginf(rows), 0, rows)


READERS: dict[str, Callable[[Path, str | None, str | None, int], np.ndarray]] = {
    ".npy": npy,
    ".npz": npz,
    ".safetensors": safetensors,
    ".parquet": table,
    ".arrow": table,
    ".tar": member,
    ".pkl": mmsa,
}


@functools.lru_cache(4)
def opened_zip(path: Path, stamp: tuple[int, int, int]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@functools.lru_cache(1)
def opened_pickle(path: Path, stamp: tuple[int, int, int]) -> dict[str, Any]:
    tree = read_arrays(path)
    if not isinstance(tree, dict):
        raise Refused(f"holds a {type(tree).__name__} instead of a dictionary of splits")
    return tree


@functools.lru_cache(4)
def opened_safetensors(path: Path, stamp: tuple[int, int, int]) -> tuple[Any, list[str]]:
    file = safe_open(path, "pt")
    return file, sorted(file.keys())
