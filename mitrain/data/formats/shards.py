"""Records in tar archives as WebDataset writes them: members KEY.EXT, one record's one after another.

A column is an extension (``jpg``; several, of which a record has one: ``jpg;png``) or a key of the record's ``json`` member.
Of an input the member's place is noted (`mitrain.data.contents`) and nothing read; of other columns the member's text is.
Nothing is ever extracted. What no such archive holds, as links, is refused.
"""

import tarfile
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from mitrain.core import parsing
from mitrain.core.errors import DataError

LARGEST = 1 << 24  # bytes of a member that is read as text
END = bytes(tarfile.BLOCKSIZE)  # what an archive ends with

Member = tuple[str, str, int, int]  # key, extension, first byte, bytes


def rows_of_shard(
    path: Path, address: str, columns: Collection[str], files: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and cells of every record. ``address``: the archive's path below the data's folder; ``files``: inputs' columns."""
    texts = {part: name for name in columns if name not in files for part in name.split(";")}
    places = {part: name for name in files for part in name.split(";")}
    keys: set[str] = set()
    with open(path, "rb") as file:
        for key, members in groupby(members_of(file, path), key=lambda member: member[0]):
            if key in keys:
                raise DataError(f"{path}:{key}: its members do not stand together, or stand twice: write the archive again")
            keys.add(key)
            cells: dict[str, Any] = {}
            for _, extension, offset, size in members:
                where = f"{path}:{key}.{extension}"
                new: Mapping[str, Any] = {}
                if extension in places:
                    shown = f"{key}.{extension}".replace("#", "_")
                    new = {places[extension]: f"{address}#{offset:012}+{size}/{shown}"}
                elif extension in texts:
                    new = {texts[extension]: text_at(file, offset, size, where)}
                elif extension == "json":
                    try:
                        value = parsing.parse_json(text_at(file, offset, size, where))
                    except parsing.Unreadable as error:
                        raise DataError(f"{where}: {error}: correct it") from None
                    if not isinstance(value, dict):
                        raise DataError(f"{where}: a {type(value).__name__} instead of an object: write {{...}}")
                    new = value
                if twice := [name for name in new if name in cells]:
                    raise DataError(f"{where}: gives {twice[0][:60]!r} a second time: leave one out")
                cells |= new
            yield key, cells


def members_of(file: BinaryIO, path: Path) -> Iterator[Member]:
    """The files of an archive in their order; DataError for what is none, and where the archive is torn."""
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is closed by who opened it
        while (member := archive.next()) is not None:
            archive.members.clear()  # else it keeps them all
            after = file.tell()
            if not member.isdir():
                yield checked(member, path)
            file.seek(after)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{str(path)!r} is no readable tar archive ({error}): write it again, uncompressed") from None
    file.seek(archive.offset)
    if file.read(len(END)) != END:
        raise DataError(f"{str(path)!r} is torn (its end mark is missing at byte {archive.offset}): write it again")


def checked(member: tarfile.TarInfo, path: Path) -> Member:
    where, parts = f"{path}: the member {member.name[:80]!r}", Path(member.name).parts
    if not member.isreg() or member.issparse():
        raise DataError(f"{where} is no plain file: write the archive again without it")
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        raise DataError(f"{where} leads out of the archive: name members KEY.EXT")
    folder, _, name = member.name.removeprefix("./").rpartition("/")
    key, dot, extension = name.partition(".")
    if not (key and dot and extension):
        raise DataError(f"{where} has no key or no extension: name members KEY.EXT")
    return f"{folder}/{key}" if folder else key, extension, member.offset_data, member.size


def text_at(file: BinaryIO, offset: int, size: int, where: str) -> str:
    if size > LARGEST:
        raise DataError(f"{where}: has {size} bytes, {LARGEST} of text are allowed: shorten it")
    file.seek(offset)
    try:
        return file.read(size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is no text in UTF-8 (byte {error.start}): convert it") from None
