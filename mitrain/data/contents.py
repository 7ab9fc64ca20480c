"""The bytes of a sample's file: a file below the data's folder, or a part of one, as FILE#PLACE.

    table.parquet#ROW/COLUMN          a cell of a Parquet or Arrow table: bytes, or {"bytes", "path"} as of Hugging Face's
    part.arrow#ROW/COLUMN             Image, Audio and Video (`mitrain.data.tables`)
    shard.tar#OFFSET+SIZE/NAME        a member of a tar archive (`mitrain.data.formats.shards`)

Paths come from annotation files, so they are held to stay under the data's folder as they are written; links in that
folder are its owner's and are followed.
"""

import os
import re
from functools import lru_cache
from pathlib import Path

from mitrain.core.errors import DataError, UserError
from mitrain.data import tables
from mitrain.data.tables import Refused

MAX_BYTES = 1 << 30  # of a file that is read whole: its digest is of the bytes that are decoded
ADDRESS = re.compile(r"(.+?\.(?:parquet|arrow|tar))#(.*)", re.DOTALL)
MEMBER = re.compile(r"([0-9]{1,18})\+([0-9]{1,18})/.*", re.DOTALL)


def read_content(root: Path, relative: str, what: str = "picture", most: int = MAX_BYTES) -> tuple[bytes, str]:
    """The bytes of the file or part ``relative`` below ``root``, and what it is called in messages.

    Raises DataError, naming the file, where its path leads out of ``root``, where it is missing, or has over ``most`` bytes.
    """
    address = ADDRESS.fullmatch(relative) if isinstance(relative, str) else None
    if address is None:
        path, where = contained(root, relative, what), f"{relative!r} in {str(root)!r}"
        return read_whole(path, where, what, most), where
    path, where = container(root, address[1], what), f"{relative!r} in {str(root)!r}"
    try:
        content = part_of(path, address[2], most)
    except Refused as error:
        raise DataError(f"{where} {error}") from None
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds for what is torn or hostile
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{where} cannot be read ({reason}): write {path.name} again") from None
    if isinstance(content, str):
        content = read_whole(contained(root, content, what), f"{content!r} in {str(root)!r}", what, most)
    return content, where


@lru_cache(1024)
def container(root: Path, relative: str, what: str) -> Path:
    """`contained`, asked once for all parts of a table or archive: whoever opens it says where it is gone."""
    return contained(root, relative, what)


def part_of(path: Path, place: str, most: int = MAX_BYTES) -> bytes | str:
    """The bytes at a ``place`` in a table or archive, or the path that stands there instead. Raises Refused."""
    if path.suffix != ".tar":
        return tables.content(path, place, most)
    span = MEMBER.fullmatch(place)
    if span is None:
        raise Refused("names no member of an archive: write FILE.tar#OFFSET+SIZE/NAME")
    offset, size = int(span[1]), int(span[2])
    if size > most:
        raise Refused(f"has {size} bytes, {most} are allowed: leave it out")
    with open(path, "rb") as file:
        content = os.pread(file.fileno(), size, offset) if offset + size <= os.fstat(file.fileno()).st_size else b""
    if len(content) < size:
        raise Refused(f"lies beyond the end of {path.name}: write it again")
    return content


def read_whole(path: Path, where: str, what: str = "picture", most: int = MAX_BYTES) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= most:
                return file.read(most)
    except OSError as error:
        raise DataError(f"{where} cannot be opened ({error.strerror}): make it readable") from None
    raise DataError(f"{where} has {size} bytes, {most} are allowed: this is no {what} to train on")


def contained(root: Path, relative: str, what: str = "picture") -> Path:
    """The file ``relative`` in ``root``, if it is one and its path, as it is written, stays below ``root``."""
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise DataError(f"{str(relative)[:80]!r} is not a path of a {what} in {str(root)!r}: correct the annotation")
    base = os.path.abspath(root)
    whole = os.path.normpath(os.path.join(base, relative))
    if not (below(whole, base) or below(whole, os.path.realpath(root))):  # a whole path may name either
        raise DataError(f"{relative[:200]!r} leads out of the data folder {str(root)!r}: give paths below it")
    path = Path(whole)
    try:
        there = path.is_file()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise DataError(
            f"{relative[:80]!r} in {str(root)!r} cannot be opened ({error.strerror}): correct the path"
        ) from None
    if not there:
        link = ", only a link that leads to none" if path.is_symlink() else ""
        raise DataError(f"no {what} {relative[:200]!r} in {str(root)!r}{link}: put it there or correct the path")
    return path


def below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))
