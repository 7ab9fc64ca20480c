"""What memory this process may use: the machine's, or that of its control groups (Slurm, systemd, Docker)."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mitrain.core.errors import UserError

GROUPS, OF_THIS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
WATCH, LAST = "what is left", 32 << 20
"""A thread, and bytes left below which it ends the process."""
FASTEST, LONGEST_S, SHORTEST_S = 4 << 30, 0.5, 0.002
"""Bytes a second that a process may take; how often it is looked at what is left follows from it, within bounds."""
UNLIMITED = 1 << 62  # what a group of version 1 without a limit says is 2⁶³ less a page


@dataclass(frozen=True)
class Group:
    """A control group's folder. ``limit``, ``usage``: names of its files; ``cache``: fields of memory.stat, in bytes."""

    folder: Path
    limit: str = "memory.max"
    usage: str = "memory.current"
    cache: tuple[str, ...] = ("active_file", "inactive_file")

    def most(self) -> int:
        """The bytes that its processes may hold together; `sys.maxsize` without a limit."""
        with suppress(OSError, ValueError):  # "max", or no such group
            return int((self.folder / self.limit).read_text())
        return sys.maxsize

    def left(self) -> int:
        """The bytes that are still free in it; pages of files count as free, since the kernel lets go of them first."""
        if (most := self.most()) == sys.maxsize:
            return most
        fields = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return most - int((self.folder / self.usage).read_text()) + sum(int(fields.get(name, 0)) for name in self.cache)


def groups() -> Iterator[Group]:
    """Those of this process, from its own upwards: each one's limit holds. In a container the top is its own."""
    for line in OF_THIS.read_text().splitlines() if OF_THIS.is_file() else ():
        _, controllers, name = line.split(":", 2)
        place = PurePosixPath(name)
        for folder in (place, *place.parents):
            if not controllers:
                yield Group(GROUPS / folder.relative_to("/"))
            elif "memory" in controllers.split(","):
                cache = ("total_active_file", "total_inactive_file")
                yield Group(
                    GROUPS / "memory" / folder.relative_to("/"), "memory.limit_in_bytes", "memory.usage_in_bytes", cache
                )


def there() -> int:
    """Bytes of this machine, or of the control group that this process may use."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(group.most() for group in groups())])


@contextmanager
def watched(told: Callable[[str], object]) -> Iterator[None]:
    """Inside, a process whose control groups have next to nothing left ends in a line, after ``told`` got the reason, from
    another thread. Without it the kernel ends the process, which then says nothing.

    What is left is watched, and nothing refused: what a process has mapped (malloc's 64 MB ahead for every thread, files)
    says little of what it holds. What a group has left counts all its processes: the first of them to see it ends, and its
    launcher the others.
    """
    limited = [group for group in groups() if group.most() < UNLIMITED]
    if not limited:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=watch, args=(limited, ended, told), name=WATCH, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def watch(limited: Sequence[Group], ended: threading.Event, told: Callable[[str], object]) -> None:
    """Until it has ``ended``, or the process must."""
    wait = SHORTEST_S
    while not ended.wait(wait):
        with suppress(OSError, ValueError):
            left = min(group.left() for group in limited)
            wait = min(LONGEST_S, max(SHORTEST_S, (left - LAST) / FASTEST))
            if left < LAST:
                limit = min(group.most() for group in limited) / 1e6
                why = f"out of memory (of the {limit:,.0f} MB of this process's control group nothing is left)"
                os.write(2, f"mitrain: {why}: lower train.batch, or raise the limit to what mitrain plan says\n".encode())
                try:
                    told(why)
                finally:  # whatever becomes of the word
                    os._exit(UserError.exit_code)
                return
