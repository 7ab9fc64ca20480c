"""Whether what was prepared is still what was made: every file's sha256 is taken when it is made and compared when used.

Once per process, whatever size and time a file has: a flipped bit changes neither. Pictures are left out, which a data set
may have thousands of; what encodes them reads them by their content.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from mitrain.core.files import sha256_file

PICTURES = (".png", ".jpg", ".jpeg", ".gif")


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file in ``folder`` but pictures, by its path there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() not in PICTURES]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def damaged(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """The files of ``folder`` that are missing or have another sha256 than ``expected``."""
    return list(compared(folder, tuple(sorted(expected.items())), tuple(stamp(folder / name) for name in expected)))


@cache
def compared(folder: Path, expected: tuple[tuple[str, str], ...], stamps: tuple) -> tuple[str, ...]:
    """`damaged`, once per process while no file is replaced (``stamps``)."""
    paths = [folder / name for name, _ in expected]
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda path: sha256_file(path) if path.is_file() else None, paths))
    return tuple(name for (name, sum_), here in zip(expected, sums, strict=True) if sum_ != here)


def stamp(path: Path) -> tuple[int, int, int] | None:
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
