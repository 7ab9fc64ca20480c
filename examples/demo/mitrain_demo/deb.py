"""Files out of a Debian package, without root and without dpkg.

A ``.deb`` is an ``ar`` archive of three members; the last one, ``data.tar.*``, holds the files (man 5 deb). It is
read as a stream and nothing is written to the disk: the caller gets each wanted file's content and decides.
"""

import gzip
import io
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from mitrain.core.errors import PrepareError

AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60  # bytes: name 16, time 12, owner 6, group 6, mode 8, size 10, end 2
MAX_FILE = 64 << 20  # bytes of one file
MAX_TOTAL = 1 << 30  # bytes of all wanted files together
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    zstandard.ZstdError,
)


class Window(io.RawIOBase):
    """``size`` bytes of ``file`` from where it stands, as a file of its own."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.file.read(min(len(buffer), self.left))
        self.left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def members(archive: Path, under: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(path below the folder ``under``, content) of each regular file there whose name ends in one of ``suffixes``.

    Links, devices and paths that lead elsewhere are passed over. Raises PrepareError where the archive is torn, is
    no Debian package, or holds more than MAX_FILE bytes in a file or MAX_TOTAL in all.
    """
    total = 0
    try:
        with open(archive, "rb") as file, data_tar(file) as tar:
            for entry in tar:
                path = wanted_path(entry, under, suffixes)
                if path is None:
                    continue
                total += entry.size
                if entry.size > MAX_FILE or total > MAX_TOTAL:
                    raise PrepareError(f"{str(archive)!r}: {entry.name!r} is too large: get the original package")
                yield path, tar.extractfile(entry).read()
    except BROKEN as error:
        raise PrepareError(f"{str(archive)!r} is not a whole Debian package ({error}): download it again") from None


def wanted_path(entry: tarfile.TarInfo, under: str, suffixes: tuple[str, ...]) -> str | None:
    path = posixpath.normpath(entry.name)
    folder = under.strip("/") + "/"
    if not entry.isreg() or not path.startswith(folder) or not path.endswith(suffixes):
        return None
    return path.removeprefix(folder)


def data_tar(file: BinaryIO) -> tarfile.TarFile:
    """The package's ``data.tar`` as a stream; ``file`` stands at the start of the ``.deb``."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise ValueError("it does not begin with the ar signature")
    while len(header := file.read(AR_HEADER)) == AR_HEADER:
        name = header[:16].decode("ascii").strip().rstrip("/")
        size = int(header[48:58].decode("ascii"))
        if size < 0:
            raise ValueError(f"the member {name!r} has a negative size")
        if name.startswith("data.tar"):
            stream = decompressed(name.removeprefix("data.tar"), io.BufferedReader(Window(file, size)))
            return tarfile.open(fileobj=stream, mode="r|", errorlevel=2)
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("it has no data.tar")


def decompressed(suffix: str, stream: BinaryIO) -> BinaryIO:
    match suffix:
        case ".xz" | ".lzma":
            return lzma.open(stream)
        case ".gz":
            return gzip.open(stream)
        case ".zst":
            return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        case "":
            return stream
    raise ValueError(f"its data.tar{suffix} is compressed in a way we do not know")
