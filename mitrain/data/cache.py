"""A cache for what is frozen: computed once, addressed by content, checked whenever it is read.

A cache is a folder named by everything its values depend on (weights, layer, preprocessing, precision); inside are
*segments* (``segments.py``), each published whole under a name of its own:

    <root>/<address>/identity.json
    <root>/<address>/<segment>/...

An interrupted fill loses at most the segment under way. Two processes that fill at once write segments of their own;
an item that stands in both is read from either. Items are dictionaries of 2-D float arrays (rows, width).
An item is checked whenever it is read, and no sooner. A segment in which anything is found to be wrong is named once and
taken away; its items are computed again as they are asked for, and stored by the next process that fills the cache.
"""

import bisect
import itertools
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from mitrain.core import dist
from mitrain.core.config import digest
from mitrain.core.errors import DataError, ModelError
from mitrain.core.files import atomic_folder, write_json
from mitrain.data.segments import INDEX, Item, key_of, keys_in, read_index, read_item, write_segment

log = logging.getLogger(__name__)

Compute = Callable[[Sequence[str]], dict[str, Item]]
SEGMENT_ITEMS = 512
AHEAD: ContextVar[bool] = ContextVar("ahead", default=False)


class NotKept(Exception):
    """What is read ahead is not in the cache."""


@contextmanager
def reading_ahead() -> Iterator[None]:
    """Inside, in this thread, caches compute nothing and change nothing: what they lack raises `NotKept`."""
    before = AHEAD.set(True)
    try:
        yield
    finally:
        AHEAD.reset(before)


class FeatureCache:
    """Items by key, kept under ``root``; ``root=None`` keeps them in memory for this process alone."""

    def __init__(self, root: Path | None, identity: dict, dtypes: dict[str, str]):
        self.dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self.folder: Path | None = None
        self._memory: dict[str, Item] = {}  # all of it where there is no folder, else what the next segment will hold
        self._lost: set[bytes] = set()  # of items whose segments were found damaged
        # A million items are a number each: that of the entry, counted through the segments, as `_starts` has them.
        self._where: dict[bytes, int] = {}
        self._again: dict[bytes, list[int]] = {}  # further entries of items that several segments hold
        self._segments: list[tuple[Path, np.ndarray]] = []
        self._starts = [0]
        self._known: set[Path] = set()  # segments, sound or not, that were looked at
        self._checked: set[bytes] = set()  # of items that this process has read before
        if root is not None:
            self.folder = root / digest({**identity, "stored as": dtypes, "layout": 3})
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "identity.json").exists():
                write_json(self.folder / "identity.json", identity)
            self.refresh()

    def refresh(self) -> None:
        """Take in the segments that other processes have published."""
        found = {path.parent for path in self.folder.glob(f"[!.]*/{INDEX}")}
        for segment in sorted(found - self._known):
            try:
                self._take_in(segment, read_index(segment))
            except (OSError, ValueError) as error:
                self._discard(segment, error)

    def _take_in(self, segment: Path, index: np.ndarray) -> None:
        self._known.add(segment)
        new = dict(zip(keys_in(index), itertools.count(self._starts[-1])))
        for key in new.keys() & self._where.keys():
            self._again.setdefault(key, []).append(new.pop(key))
        self._where |= new
        self._segments.append((segment, index))
        self._starts.append(self._starts[-1] + len(index))

    def __contains__(self, key: str) -> bool:
        return key_of(key) in self._where or key in self._memory

    def get(self, key: str) -> Item | None:
        """The item; None where there is none, or none that is undamaged."""
        own = key_of(key)
        while (number := self._where.get(own)) is not None:
            place = bisect.bisect(self._starts, number) - 1
            segment, index = self._segments[place]
            try:
                item = read_item(segment, key, index[number - self._starts[place]], self.dtypes)
            except (OSError, ValueError) as error:
                if AHEAD.get():
                    raise NotKept from None  # it is the main thread that forgets the segment
                self._discard(segment, error)
            else:
                self._checked.add(own)
                return item
        return self._memory.get(key)

    def _discard(self, segment: Path, error: Exception) -> None:
        """Forget a damaged segment, and delete it, but not where the disk or its permissions are at fault."""
        log.warning("cache segment %s is damaged (%s): its items are computed again", segment, error)
        self._known.add(segment)
        for (path, index), start in zip(self._segments, self._starts, strict=False):
            if path == segment:
                self._forget(index, range(start, start + len(index)))
        if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
            shutil.rmtree(segment, ignore_errors=True)

    def _forget(self, index: np.ndarray, numbers: range) -> None:
        self._lost.update(keys_in(index))
        self._checked.difference_update(keys_in(index))
        for key in keys_in(index):
            left = [number for number in (self._where.pop(key), *self._again.pop(key, [])) if number not in numbers]
            if left:
                self._where[key], *more = left
                self._again |= {key: more} if more else {}

    def read(self, keys: Sequence[str], compute: Compute, together: bool = False) -> list[Item]:
        """The items of ``keys``, in their order; what is not there, or no longer whole, is computed and not stored.

        Of the latter as many are held as a segment has: all of a small cache, so that no step computes them anew.
        ``together``: ``compute`` runs on all ranks at once, as the weights are spread over them.
        """
        unique = list(dict.fromkeys(keys))
        there = sum(key in self for key in unique)
        held = {key: item for key in unique if (item := self.get(key)) is not None}
        if len(held) < there and together and dist.world() > 1:
            raise DataError(f"the cache {self.folder} was damaged while the ranks were reading it: resume the run")
        absent = [key for key in unique if key not in held]
        if absent and AHEAD.get():
            raise NotKept
        if absent:
            new = {key: self.rounded(item) for key, item in compute(absent).items()}
            if len(self._memory) < SEGMENT_ITEMS:
                self._memory.update({key: item for key, item in new.items() if key_of(key) in self._lost})
            held.update(new)
        return [held[key] for key in keys]

    def fill(
        self,
        keys: Iterable[str],
        compute: Compute,
        batch: int = 32,
        progress: Callable[[int], object] = lambda done: None,
        together: bool = False,
    ) -> int:
        """Compute the items of ``keys`` that are missing, ``batch`` at a time; returns how many this process computed.

        ``compute`` may leave items out (samples that cannot be read). Ranks that share a folder share the work: each takes
        every n-th, and what then is still missing (their folders were not the same one).
        """
        keys = list(dict.fromkeys(keys))
        missing, spare = self.missing(keys, together), keys[:1]
        if self.folder is None or dist.world() == 1:
            return self._compute(missing, compute, batch, progress, spare)
        missing = list(dict.fromkeys(key for part in dist.gather(missing) for key in part))
        computed = self._compute(missing[dist.rank() :: dist.world()], compute, batch, progress, spare)
        self.refresh()
        return computed + self._compute(self.missing(keys, together), compute, batch, progress, spare)

    def missing(self, keys: Iterable[str], together: bool = False) -> list[str]:
        """Those of ``keys`` that are not there. Damage is noticed later, by who reads them.

        ``together``: as for `read`, where one rank can compute nothing alone later. Each item is then read now, once.
        """
        keys = list(keys)
        for key in keys if together and dist.world() > 1 else ():
            if (own := key_of(key)) in self._where and own not in self._checked:
                self.get(key)
        return [key for key in keys if key not in self]

    def _compute(
        self,
        missing: Sequence[str],
        compute: Compute,
        batch: int,
        progress: Callable[[int], object],
        spare: Sequence[str],
    ) -> int:
        """Ranks do equally many rounds, and all have published when the last is through."""
        computed = 0
        chunks = [missing[start : start + batch] for start in range(0, len(missing), batch)]
        try:
            for chunk, own in dist.lockstep(chunks, spare):
                new = compute(chunk)
                if own:
                    self.add(new)
                    computed += len(new)
                    progress(len(chunk))
        finally:
            self.flush()
        dist.barrier()
        return computed

    def add(self, items: dict[str, Item]) -> None:
        """Keep ``items``; on disk from the next `flush` on, which many of them bring about."""
        self._memory.update({key: self.rounded(item) for key, item in items.items()})
        if len(self._memory) >= SEGMENT_ITEMS:
            self.flush()

    def flush(self) -> None:
        """Publish what was added, as one segment."""
        if self.folder is not None and self._memory:
            items, self._memory = self._memory, {}
            self._publish(items)

    def rounded(self, item: Item) -> Item:
        """The item in the precision it is stored with; ModelError where a value is not finite in it."""
        with np.errstate(over="ignore"):
            stored = {name: np.asarray(array, self.dtypes[name]) for name, array in item.items()}
        for name, array in stored.items():
            if not np.isfinite(array).all():
                whole = np.isfinite(item[name]).all()
                mend = "take other layers" if whole else "check its weights, or set model.dtype=fp32"
                raise ModelError(f"a frozen model's {name} are not finite in {array.dtype}, as they are kept: {mend}")
        return stored

    def _publish(self, items: dict[str, Item]) -> None:
        segment = self.folder / uuid.uuid4().hex[:16]
        try:
            with atomic_folder(segment) as work:
                index = write_segment(work, items)
        except OSError as error:
            raise DataError(
                f"cannot write the cache {self.folder} ({error}): free space there, set MITRAIN_CACHE, or give cache=false"
            ) from None
        self._take_in(segment, index)
