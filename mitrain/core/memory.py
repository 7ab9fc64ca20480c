"""What memory this process may use: the machine's, or that of its control groups (Slurm, systemd, Docker)."""

import os
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mitrain.core.errors import UserError

GROUPS, OF_THIS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NEAR, LAST, EVERY_S = 48 << 20, 24 << 20, 0.01
"""Bytes left, looked at so often, below which a process may map no more, and below which it ends."""
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
def bounded() -> Iterator[None]:
    """Inside, a process whose control groups have next to nothing left is refused what it asks for: MemoryError, or torch's
    RuntimeError. Without it the kernel ends the process, which then says nothing.

    What is left is watched, since what a process has mapped says little of what it holds: malloc maps 64 MB ahead for every
    thread. Several processes of a group are not told of one another.
    """
    watched = [group for group in groups() if group.most() < UNLIMITED]
    if not watched or not Path("/proc/self/status").is_file():
        yield
        return
    before, ended = resource.getrlimit(resource.RLIMIT_DATA), threading.Event()
    thread = threading.Thread(target=watch, args=(watched, ended, before[1]), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        resource.setrlimit(resource.RLIMIT_DATA, before)


def watch(watched: Sequence[Group], ended: threading.Event, hard: int) -> None:
    """Until it has ``ended``; once little is left, what this process has mapped is the most it may map.

    Where it goes on with what malloc had mapped ahead, it ends in a line just before the kernel would end it without one.
    """
    mapped = 0
    while not ended.wait(EVERY_S):
        with suppress(OSError, ValueError):
            left = min(group.left() for group in watched)
            if left < NEAR and not mapped:
                mapped = 1024 * int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0])
                resource.setrlimit(resource.RLIMIT_DATA, (mapped, hard))
            elif left < LAST:
                limit = min(group.most() for group in watched) / 1e6
                text = f"mitrain: out of memory (of the {limit:,.0f} MB of this process's control group nothing is left): "
                os.write(2, f"{text}lower train.batch, or raise the limit to what mitrain plan says\n".encode())
                os._exit(UserError.exit_code)
                return
