"""What was read of pictures before, found again by a file's path, size and times: an unchanged picture is not read anew.

    <cache>/index/<digest of the data's folder>    MARK, sha256 of the rest, and rows of `ROW`

A row's key is a hash of path, size, inode, mtime and ctime; a changed file, or another host's file of the same path, has a
row of its own. It says what one reading of the whole file found: the content's digest, the size and the turn, and by being
there that the picture can be decoded. The file is replaced as a whole. One that is torn, or not ours, is not believed:
pictures are then read again. Of two processes that write at once one may be lost, and its pictures are read again.

As in git's index, a file that changed just before it was read is not entered: within the clock tick of its file system it
could change once more and keep its times. ctime is compared because mtime can be set (cp -p, rsync, tar), the inode because
a link may be set to another file of the same tick.

What these cannot tell: damage of the disk below the file, a clock that was turned back or runs behind on a file server, a
file system that keeps no change time, a server's times that its client has not asked for again, and a write through a
memory map that the kernel has not stamped yet. `mitrain data inspect` reads every picture and names those whose content is
not what the index says; their rows are put right.
"""

import hashlib
import logging
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TypeVar

from mitrain.core import parsing
from mitrain.core.files import write_atomic
from mitrain.data.images import TURNS, Decoded, Facts
from mitrain.data.media import Limits, Medium

log = logging.getLogger(__name__)

T, R = TypeVar("T"), TypeVar("R")

MARK = b"mitrain pictures 1\n"
ROW = struct.Struct("<16s32sIIB")  # key, sha256, width, height, EXIF's number of the turn (1: none)
MOST = 1 << 22  # rows of a folder, 239 MB: the oldest go first
RECENT_NS = 2_000_000_000  # the coarsest file times in use (FAT) have a tick of 2 s
THREADS = min(8, os.cpu_count() or 1)  # decoders of Pillow let other threads run
EXIF = {turn: tag for tag, turn in TURNS.items()}

Stamp = tuple[int, int, int, int]


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``function`` of each item, in their order, computed by threads a little before it is asked for."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * THREADS:  # bounds what is held of pictures that nobody has asked for yet
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class FileIndex:
    """The files of one kind under ``root``, seen through what earlier processes noted in ``folder`` (none: nothing)."""

    def __init__(self, root: Path, folder: Path | None, medium: Medium, limits: Limits):
        self.root, self.medium, self.limits = Path(root), medium, limits
        self._base = os.path.abspath(root)
        other = "" if medium.name == "image" else f"\0{medium.name}"
        name = hashlib.sha256(f"{os.path.realpath(root)}{other}".encode(errors="surrogateescape")).hexdigest()
        self.path = folder / name if folder else None
        self.rows: dict[bytes, bytes] = {}  # read by this process, or by ranks of its run
        self._gone: set[bytes] = set()
        self._published = 0

    def stamp(self, image: str) -> Stamp | None:
        """Size, inode, mtime and ctime in ns; None where there is no such file."""
        try:
            whole = os.path.normpath(os.path.join(self._base, image))
            try:
                status = os.stat(whole)
            except FileNotFoundError:
                status = os.stat(whole.rpartition("#")[0])  # FILE#ARRAY
        except (OSError, ValueError, TypeError):  # an annotation may hold anything; reading it says what is wrong
            return None
        return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns

    def find(self, images: Sequence[str]) -> dict[str, Facts | None]:
        """What is known of ``images`` whose files are unchanged since they were read; None of those that are not there."""
        parts = [images[start::THREADS] for start in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:  # a network file system takes a while for each
            stamped = pool.map(lambda part: [(image, self.stamp(image)) for image in part], parts)
            stamps = dict(chain.from_iterable(stamped))
        wanted = {key(image, stamp): image for image, stamp in stamps.items() if stamp}
        facts: dict[str, Facts | None] = {image: None for image in images if not stamps[image]}
        for row in chain(self._stored(), self.rows.values()) if wanted else ():
            name, digest, width, height, tag = ROW.unpack(row)
            if name in wanted and name not in self._gone:
                where = f"{wanted[name]!r} in {str(self.root)!r}"
                known = Facts(digest=digest.hex(), stored_size=(width, height), turn=TURNS.get(tag), where=where)
                facts |= {wanted[name]: known} if self.medium.admits(known, self.limits) else {}
        return facts

    def read(self, image: str) -> Decoded:
        """Read and decode the file, and note what it is. DataError as of the kind's `Medium.read`."""
        before, begun = self.stamp(image), time.time_ns()
        name = key(image, before) if before else b""
        self._gone.add(name)  # what an earlier reading said holds no longer, be this one refused or too early
        found = self.medium.read(self.root, image, self.limits)
        # The stamp is the content's only if nothing changed while it was read, nor can have just before.
        if before and before == self.stamp(image) and max(before[2:]) < begun - RECENT_NS:
            self.rows[name] = ROW.pack(name, bytes.fromhex(found.digest), *found.stored_size, EXIF.get(found.turn, 1))
            self._gone.discard(name)
        return found

    def forget(self) -> None:
        """Let go of what this process read, and has not published."""
        self.rows.clear()
        self._gone.clear()

    def publish(self, least: int = 0) -> None:
        """Let later processes find what this one read, if ``least`` pictures are new; a failure is a warning only."""
        if self.path is None or not (self.rows or self._gone) or len(self.rows) < self._published + least:
            return
        self._published = len(self.rows)
        stored = {row[:16]: row for row in self._stored()}
        rows = {name: row for name, row in (stored | self.rows).items() if name not in self._gone}
        if rows == stored:
            return
        body = b"".join(list(rows.values())[-MOST:])
        try:
            write_atomic(self.path, MARK + hashlib.sha256(body).digest() + body)
        except OSError as error:
            log.warning("cannot write %s (%s): pictures will be read again at the next start", self.path, error)

    def _stored(self) -> Iterator[bytes]:
        if self.path is None:
            return
        try:
            content = parsing.read_bytes(self.path, len(MARK) + 32 + MOST * ROW.size, follow=False)
            body = memoryview(content)[len(MARK) + 32 :]
            if content[: len(MARK) + 32] != MARK + hashlib.sha256(body).digest() or len(body) % ROW.size:
                raise parsing.Unreadable("is damaged")
        except FileNotFoundError:
            return
        except (OSError, parsing.Unreadable) as error:
            log.warning("the picture index %s cannot be used (%s): pictures are read again", self.path, error)
            return
        for start in range(0, len(body), ROW.size):
            yield bytes(body[start : start + ROW.size])


def key(image: str, stamp: Stamp) -> bytes:
    text = "\0".join((image, *map(str, stamp)))
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
