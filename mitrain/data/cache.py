"""A cache for what is frozen: computed once, addressed by content, memory-mapped.

A cache is a folder named by everything its values depend on (weights, layer, preprocessing, precision); inside are
*segments*, each published whole under a name of its own:

    <root>/<address>/identity.json
    <root>/<address>/<segment>/index.json     item key → first row and number of rows of each array
    <root>/<address>/<segment>/<array>.npy    the rows of all the segment's items, one after another

An interrupted fill loses at most the segment under way. Two processes that fill at once write segments of their own;
an item that stands in both is read from either. Items are dictionaries of 2-D float arrays (rows, width).
"""

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from mitrain import dist
from mitrain.config import digest
from mitrain.errors import DataError
from mitrain.files import atomic_folder, write_json

log = logging.getLogger(__name__)

Item = dict[str, np.ndarray]
SEGMENT_ITEMS = 512


class FeatureCache:
    """Items by key, kept under ``root``; ``root=None`` keeps them in memory for this process alone."""

    def __init__(self, root: Path | None, identity: dict, dtypes: dict[str, str]):
        self.dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self.folder: Path | None = None
        self._where: dict[str, tuple[dict[str, np.ndarray], dict[str, list[int]]]] = {}
        if root is not None:
            self.folder = root / digest({**identity, "stored as": dtypes, "layout": 1})
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "identity.json").exists():
                write_json(self.folder / "identity.json", identity)
            self.refresh()

    def refresh(self) -> None:
        """Take in the segments that other processes have published."""
        for index in sorted(self.folder.glob("[!.]*/index.json")):
            try:
                self._open(index.parent, json.loads(index.read_text()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("cache segment %s is damaged (%s): its items are computed again", index.parent, error)

    def _open(self, segment: Path, index: dict[str, dict[str, list[int]]]) -> None:
        arrays: dict[str, np.ndarray] = {}
        for places in index.values():
            for name, (first, rows) in places.items():
                if name not in arrays:
                    arrays[name] = np.load(segment / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                if first < 0 or first + rows > len(arrays[name]):
                    raise ValueError(f"rows {first}..{first + rows} are not in {name}.npy")
        for key, places in index.items():
            self._where.setdefault(key, (arrays, places))

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __getitem__(self, key: str) -> Item:
        arrays, places = self._where[key]
        return {name: arrays[name][first : first + rows] for name, (first, rows) in places.items()}

    def fill(
        self,
        keys: Iterable[str],
        compute: Callable[[Sequence[str]], dict[str, Item]],
        batch: int = 32,
        progress: Callable[[int], object] = lambda done: None,
    ) -> int:
        """Compute the items of ``keys`` that are missing, ``batch`` at a time; returns how many this process computed.

        ``compute`` may leave items out (samples that cannot be read). Ranks that share a folder share the work: each
        takes every n-th, and what then is still missing (their folders were not the same one).
        """
        keys = list(dict.fromkeys(keys))
        missing, spare = [key for key in keys if key not in self], keys[:1]
        if self.folder is None or dist.world() == 1:
            return self._compute(missing, compute, batch, progress, spare)
        computed = self._compute(missing[dist.rank() :: dist.world()], compute, batch, progress, spare)
        self.refresh()
        return computed + self._compute([key for key in missing if key not in self], compute, batch, progress, spare)

    def _compute(
        self,
        missing: Sequence[str],
        compute: Callable[[Sequence[str]], dict[str, Item]],
        batch: int,
        progress: Callable[[int], object],
        spare: Sequence[str],
    ) -> int:
        """Ranks do equally many rounds, and all have published when the last is through."""
        done: dict[str, Item] = {}
        computed = 0
        chunks = [missing[start : start + batch] for start in range(0, len(missing), batch)]
        try:
            for chunk, own in dist.in_step(chunks, spare):
                new = compute(chunk)
                if not own:
                    continue
                done.update({key: self.rounded(item) for key, item in new.items()})
                computed += len(new)
                progress(len(chunk))
                if len(done) >= SEGMENT_ITEMS:
                    self._publish(done)
                    done = {}
        finally:
            if done:
                self._publish(done)
        dist.barrier()
        return computed

    def rounded(self, item: Item) -> Item:
        """The item in the precision it is stored with."""
        return {name: np.asarray(array, self.dtypes[name]) for name, array in item.items()}

    def _publish(self, items: dict[str, Item]) -> None:
        index: dict[str, dict[str, list[int]]] = {key: {} for key in items}
        arrays: dict[str, np.ndarray] = {}
        for name in {n for item in items.values() for n in item}:
            row, parts = 0, []
            for key, item in items.items():
                if name in item:
                    index[key][name] = [row, len(item[name])]
                    row += len(item[name])
                    parts.append(item[name])
            arrays[name] = np.concatenate(parts)
        if self.folder is None:
            self._where.update({key: (arrays, places) for key, places in index.items()})
            return
        segment = self.folder / uuid.uuid4().hex[:16]
        try:
            with atomic_folder(segment) as work:
                for name, array in arrays.items():
                    np.save(work / f"{name}.npy", array, allow_pickle=False)
                write_json(work / "index.json", index)
        except OSError as error:
            raise DataError(
                f"cannot write the cache {self.folder} ({error}): free space there, set MITRAIN_CACHE, or give cache=false"
            ) from None
        self._open(segment, index)
