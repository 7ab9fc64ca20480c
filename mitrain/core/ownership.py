"""One process trains in a run folder: what keeps a second job out, and lets the next one in when the first is dead.

RUN/.owner       there while a process trains in RUN, with its pid, host and start (see `mitrain.core.files.file_lock`)
RUN/.owner.job   under Slurm: the job, and how often it was requeued
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from mitrain.core import dist
from mitrain.core.errors import CheckpointError
from mitrain.core.files import POLL_S, Wait, holder, naming, write_atomic

MARKER = ".owner"
JOB = ".owner.job"
OWNERSHIP = (MARKER, JOB)
PATIENCE_S = 5.0  # in which the ranks of a launcher that was killed end, and a job that is started again may go on


@contextmanager
def owned(folder: str | Path) -> Iterator[None]:
    """Train in ``folder`` alone for the length of the block; rank 0 owns it for all, and a block inside another may again.

    CheckpointError on every rank where another job trains there.
    """
    lock = SoftFileLock(Path(folder) / MARKER, is_singleton=True, thread_local=False)
    dist.from_main(lambda: take(lock, Path(folder)))
    try:
        yield
    finally:
        if dist.is_main():
            lock.release()


def take(lock: SoftFileLock, folder: Path) -> None:
    job = os.environ.get("SLURM_JOB_ID")
    job = (job, os.environ.get("SLURM_RESTART_COUNT", "0")) if job else None
    if job and requeued(folder, job):
        lock.break_lock()
    try:
        with naming(folder / MARKER):
            lock.acquire(timeout=PATIENCE_S, poll_interval=POLL_S, cancel_check=Wait(lock, math.inf).look)
    except FileNotFoundError:
        raise CheckpointError(f"the run folder {folder} was deleted or moved away meanwhile: start again") from None
    except Timeout:
        raise CheckpointError(
            f"{holder(folder / MARKER)} trains in {folder}: wait for it or stop it, or give another folder with"
            f" --run-dir; if that process is gone, remove {folder / MARKER}"
        ) from None
    if job:
        write_atomic(folder / JOB, " ".join(job))
    else:
        (folder / JOB).unlink(missing_ok=True)


class Standing:
    """A folder that rank 0 writes to for long: notices when it was moved or deleted, which a write would make anew."""

    def __init__(self, folder: Path):
        self.folder, self.handle = folder, os.open(folder, os.O_RDONLY) if dist.is_main() else None

    def fault(self) -> str | None:
        """What became of the folder, or None while it is where it was."""
        if self.handle is None:
            return None
        with suppress(OSError):
            if os.path.samestat(os.stat(self.folder), os.fstat(self.handle)):
                return None
        place = Path(f"/proc/self/fd/{self.handle}")
        now = os.readlink(place) if place.exists() or place.is_symlink() else ""
        if not now or now.endswith(" (deleted)"):
            return f"{self.folder} was deleted or moved away: start again"
        return f"{self.folder} was moved to {now}: go on with mitrain train --resume {now}"

    def check(self, step: int) -> None:
        """CheckpointError where the folder is no longer there: nothing is written in its place."""
        if fault := self.fault():
            raise CheckpointError(f"at step {step} the run folder {fault}")

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)


def requeued(folder: Path, job: tuple[str, str]) -> bool:
    """Whether an earlier start of ``job`` owned the folder: it is dead, on whatever node, as Slurm runs a job once."""
    try:
        number, restarts = (folder / JOB).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return False
    return number == job[0] and restarts != job[1]
