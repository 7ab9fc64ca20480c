"""Files that are either whole or absent: the cache folder, atomic writes, checksums, locks.

Everything mitrain writes goes through this module: written beside its final name, flushed to the disk and
then renamed, so that an interruption at any moment leaves the old content or the new, never a torn one.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

from mitrain.core.errors import UserError
from mitrain.core.waiting import timeout

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    temporary = beside(path)
    try:
        with naming(path, temporary), open(temporary, "xb") as file:  # with the user's umask, unlike tempfile's
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_path(path.parent)


def beside(path: Path, mark: str = "") -> Path:
    """A hidden name in the same folder that nothing has yet."""
    return path.with_name(f".{path.name}.{mark}{secrets.token_hex(4)}")


@contextlib.contextmanager
def naming(path: Path, hidden: Path | None = None) -> Iterator[None]:
    """Let a failed write inside say that it was of ``path``: of most the system names no file, or the ``hidden`` one."""
    try:
        yield
    except OSError as error:
        if error.errno in (*FULL, errno.EIO) and error.filename in (None, str(hidden)):
            error.filename = str(path)
        raise


def remedy(error: OSError) -> str:
    """What to do about a write that failed, to go before "or give another folder"."""
    if error.errno in FULL:
        return "make room there"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "get the right to write there"
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return "use a file system that can do this"
    return "check the path and the disk"


def as_json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(path: str | Path, value: object) -> None:
    write_atomic(path, as_json(value))


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on success flush it and rename it to ``target``.

    A ``target`` that exists already is replaced. On any exception, Ctrl-C included, the half-made folder is removed.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = beside(target)
    work.mkdir()
    readable = work.stat().st_mode & 0o666
    try:
        with naming(target):
            yield work
        for path in work.rglob("*"):
            if path.is_file():
                path.chmod(readable)  # as the umask has it: safetensors' own writer makes files for their owner alone
            fsync_path(path)
        fsync_path(work)
        if target.exists():
            old = beside(target, "old.")
            old.mkdir()
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
        with naming(path):
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


@contextlib.contextmanager
def writing(out: str | Path | None) -> Iterator[None]:
    """Be the one process that writes the file ``out``, if any; UserError where another does."""
    with file_lock(f"{out}.lock", 1) if out is not None else contextlib.nullcontext():
        yield


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
        self.reported = False

    def look(self) -> bool:
        """Called at every poll; False, as the wait goes on."""
        with contextlib.suppress(FileNotFoundError):
            now = time.monotonic()
            name, file = self.path.read_text("utf-8", "replace"), self.path.stat().st_ino
            if name or file != self.file:
                self.file, self.named = file, now
            if now - self.named > EMPTY_S or is_zombie(name):
                self.lock.break_lock()
            elif now - self.start > self.silent_s and not self.reported:
                self.reported = True
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
