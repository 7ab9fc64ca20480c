"""The entries of the user's cache (`files.cache_home`): what they are, when they were last read, and which may go."""

import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mitrain.core import prepared
from mitrain.core.errors import ConfigError, nearest
from mitrain.core.files import cache_home, file_lock

RECENT_S = 26 * 3600
"""What was written or read since may be in use though no process has it open. File systems note a reading once a day."""


@dataclass(frozen=True)
class Entry:
    """A file or folder below the folder ``kind``; of features those of one encoder."""

    kind: str
    path: Path
    bytes: int
    read: float  # seconds since 1970: the last reading or writing of anything in it

    @property
    def temporary(self) -> bool:
        """What is being made, or was when its process was killed."""
        return self.path.name.startswith(".") and not self.path.name.endswith(".held")


def entries(kinds: Sequence[str] = ()) -> list[Entry]:
    """Of the ``kinds`` (none: all there are). ConfigError for a kind that is not there."""
    folders = {path.name: path for path in sorted(cache_home().glob("*")) if path.is_dir() and not path.is_symlink()}
    for kind in kinds:
        if kind not in folders:
            there = ", ".join(folders) or "nothing"
            raise ConfigError(f"no {kind!r} in {str(cache_home())!r}{nearest(kind, folders)}: there is {there}")
    chosen = {kind: folders[kind] for kind in kinds} if kinds else folders
    below = {kind: "*/*" if kind == "features" else "*" for kind in chosen}
    return [entry_of(kind, path) for kind, folder in chosen.items() for path in sorted(folder.glob(below[kind]))]


def entry_of(kind: str, path: Path) -> Entry:
    states = [one.lstat() for one in (path, *path.rglob("*"))]
    read = max(s.st_mtime if stat.S_ISDIR(s.st_mode) else max(s.st_mtime, s.st_atime) for s in states)
    return Entry(kind, path, sum(s.st_size for s in states), read)  # a folder's own reading is this one


def table(found: Sequence[Entry]) -> list[dict[str, Any]]:
    rows = []
    for kind in dict.fromkeys(one.kind for one in found):
        those = [one for one in found if one.kind == kind]
        last = time.strftime("%Y-%m-%d", time.localtime(max(one.read for one in those)))
        rows.append({"kind": kind, "entries": len(those), "bytes": sum(o.bytes for o in those), "last_read": last})
    return rows


def prune(found: Sequence[Entry], older_days: float | None = None) -> list[Entry]:
    """Remove what nothing refers to, and with ``older_days`` what was not read for so long; what is in use stays.

    Nothing refers to what a killed process left, and to what an earlier version of a recipe made. All of the rest is made
    again when it is asked for.
    """
    now, used, gone = time.time(), {part for path in opened() for part in (path, *path.parents)}, []
    for one in found:
        age = now - one.read
        wanted = one.temporary or outdated(one) or (older_days is not None and age > older_days * 86_400)
        if wanted and age > RECENT_S and one.path not in used and not one.path.name.endswith(".held"):
            remove(one)
            gone.append(one)
    return gone


def outdated(one: Entry) -> bool:
    """Whether a prepared folder was made by a recipe of another version, in whose place another is made."""
    if one.kind == "models":
        recipe = prepared.recipes("models").get(one.path.name)
        return recipe is not None and not prepared.is_ready(recipe, one.path, None)
    made = re.fullmatch(r"(.+)-(\d+)-seed\d+", one.path.name) if one.kind == "data" else None
    recipe = prepared.recipes("data").get(made[1]) if made else None
    return recipe is not None and int(made[2]) != recipe.version


def remove(one: Entry) -> None:
    """A prepared folder goes at once, and while nobody prepares it, so that no reader finds half of it."""
    if not one.path.is_dir():
        one.path.unlink(missing_ok=True)
    elif one.temporary:
        shutil.rmtree(one.path)
    else:
        away = one.path.with_name(f".{one.path.name}.gone")
        with file_lock(one.path.with_name(f".{one.path.name}.held")):
            os.replace(one.path, away)
            shutil.rmtree(away)


def opened() -> Iterator[Path]:
    """The files that processes of this machine have open or mapped; none where the system does not say."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield from (Path(os.readlink(link)) for link in (folder / "fd").iterdir())
            lines = (folder / "maps").read_text(errors="replace").splitlines()
            yield from {Path(line[line.index("/") :]) for line in lines if "/" in line}
        except OSError:  # it has ended, or is another user's
            continue
