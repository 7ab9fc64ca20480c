"""Files that are either whole or absent: the cache folder, atomic writes, checksums, locks.

Everything mitrain writes goes through this module: written beside its final name, flushed to the disk and
then renamed, so that an interruption at any moment leaves the old content or the new, never a torn one.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

from mitrain.errors import UserError
from mitrain.waiting import timeout

log = logging.getLogger(__name__)

POLL_S = 0.1
SILENT_S = 2.0  # that a wait for a lock may take unsaid
EMPTY_S = 3.0  # after which a marker without a name in it belongs to nobody: writing it takes microseconds


def cache_home() -> Path:
    """The user's mitrain cache: ``$MITRAIN_CACHE``, else ``$XDG_CACHE_HOME/mitrain``, else ``~/.cache/mitrain``."""
    if os.environ.get("MITRAIN_CACHE"):
        return Path(os.environ["MITRAIN_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mitrain"


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fsync_path(path: str | Path) -> None:
    """Flush a file's (or a folder's directory entry's) content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Replace ``path`` by ``content``: readers see the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_path(path.parent)


def write_json(path: str | Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on success flush it and rename it to ``target``.

    A ``target`` that exists already is replaced. On any exception, Ctrl-C included, the half-made folder is removed.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield work
        for path in work.rglob("*"):
            fsync_path(path)
        fsync_path(work)
        os.chmod(work, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, old / target.name)
            os.replace(work, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(work, target)
        fsync_path(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def file_lock(path: str | Path, seconds: float | None = None) -> Iterator[None]:
    """Hold ``path`` as a marker of this process: one process prepares, the others wait and say for whom.

    The file is there while it is held, with pid, host and start of the holder in it, so that no file system has to know
    locks. A holder that has ended on this host is replaced. UserError after ``seconds`` (default: `waiting.timeout`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, seconds = SoftFileLock(path), timeout() if seconds is None else seconds
    try:
        lock.acquire(timeout=seconds, poll_interval=POLL_S, cancel_check=Wait(lock, SILENT_S).look)
    except Timeout:
        raise UserError(
            f"{holder(path)} holds {path} and has not let go in {seconds:g} s:"
            " wait for it or end it; if it is gone, remove that file"
        ) from None
    try:
        yield
    finally:
        lock.release()


class Wait:
    """What a process does while another holds ``lock``: say so once, and remove a marker that nobody stands behind.

    Two kinds are such that filelock keeps: one without a name in it, which a holder left that was killed, or lost power,
    before its name was on the disk; and that of a process which has ended and whose parent has not asked how.
    """

    def __init__(self, lock: SoftFileLock, silent_s: float):
        self.lock, self.path, self.silent_s = lock, Path(lock.lock_file), silent_s
        self.start = time.monotonic()
        self.named = self.start  # when the marker last had a name in it, or was another file
        self.file = 0
        self.told = False

    def look(self) -> bool:
        """Called at every poll; False, as the wait goes on."""
        with contextlib.suppress(FileNotFoundError):
            now = time.monotonic()
            name, file = self.path.read_text("utf-8", "replace"), self.path.stat().st_ino
            if name or file != self.file:
                self.file, self.named = file, now
            if now - self.named > EMPTY_S or is_zombie(name):
                self.lock.break_lock()
            elif now - self.start > self.silent_s and not self.told:
                self.told = True
                log.warning("waiting for %s, which holds %s", holder(self.path), self.path)
        return False


def is_zombie(name: str) -> bool:
    """Whether a marker's holder is a process of this host that has ended and was not waited for."""
    try:
        pid, host, token = name.splitlines()
        fields = Path(f"/proc/{int(pid)}/stat").read_bytes().rpartition(b")")[2].split()
        started = int(fields[19]) == int(token) % 2**64  # the token's upper half is the boot's
    except (OSError, ValueError, IndexError):
        return False
    return fields[0] == b"Z" and started and host.partition("?")[0] == socket.gethostname()


def holder(path: Path) -> str:
    """Who holds a marker, as "process 71 on node-1 since 2026-01-31 12:00:00"."""
    try:
        pid, host, *_ = path.read_text("utf-8", "replace").splitlines()
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
    except (OSError, ValueError):
        return "an unknown process"
    # In a container filelock adds the number of the process namespace behind a question mark.
    return f"process {pid[:10]} on {host.partition('?')[0][:64]} since {since}"
