"""What memory this process may use: the machine's, or that of its control groups (Slurm, systemd, Docker)."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

GROUPS, OF_THIS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
KEPT = 32 << 20
"""Bytes of what a group has left that are not for a process's data: page tables, and pages of the code that runs."""
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


def heap_handed_back() -> int:
    """Bytes of malloc's heap that are mapped and not in memory, as after `allocator.give_back`: they come back without a
    word to the kernel's limits. Reading them takes milliseconds."""
    size = resident = 0
    with suppress(OSError):
        for mapping in Path("/proc/self/smaps").read_text().split("VmFlags:"):
            if "[heap]" in mapping:
                size += int(mapping.split("\nSize:")[1].split()[0])
                resident += int(mapping.split("\nRss:")[1].split()[0])
    return 1024 * (size - resident)


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, what this process takes beyond what its control groups have left is refused: MemoryError, or torch's
    RuntimeError. Without it the kernel ends the process, which then says nothing.

    Several processes of a group are not told of one another: what is left to them together is left to each.
    """
    status, left = Path("/proc/self/status"), sys.maxsize
    with suppress(OSError, ValueError):
        left = min((group.left() for group in groups()), default=left)
    if left > UNLIMITED or not status.is_file():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    mapped = 1024 * int(status.read_text().split("VmData:")[1].split()[0]) - heap_handed_back()
    bounds = [bound for bound in before if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(mapped + max(0, left - KEPT), *bounds, sys.maxsize), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
