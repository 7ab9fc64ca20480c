"""What frozen encoders make of one of the samples' inputs, computed once (or, with the cache off, whenever it is asked for).

Shapes: B samples, e width of an encoder's feature, N tokens (of an image: patches), c channels.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mitrain.core import dist
from mitrain.core.errors import DataError
from mitrain.data.cache import FeatureCache
from mitrain.data.images import Decoded, Facts, Size
from mitrain.data.index import FileIndex, ahead
from mitrain.data.media import Limits, Medium
from mitrain.data.samples import BadSamples
from mitrain.data.segments import Item
from mitrain.models import Encoder, loading

log = logging.getLogger(__name__)

Progress = Callable[[int], object]
Found = TypeVar("Found", bound=Facts)
Drawn = dict[str, tuple[Tensor, int]]
"""Preprocessed files and their views by key."""

ENCODE_BATCH = 8  # on a CPU larger batches only cost memory traffic
PUBLISHED = 8192  # files that an interruption lets be read again, at most
HELD = 1 << 26  # bytes of a block's decoded files that are kept until they are encoded


def no_progress(done: int) -> None:
    """Say nothing."""


class EncoderFeatures:
    """What one encoder makes of files, kept by their content and view: the pooled feature and, of view 0, the levels.

    ``disabled`` takes off what changes the encoder meanwhile.
    """

    def __init__(self, encoder: Encoder, cache: Path | None, disabled: Callable[[], AbstractContextManager[Any]]):
        self.encoder, self.disabled = encoder, disabled
        identity = encoder.identity() if cache else {}
        dtypes = {"pooled": "float32", "levels": "float16"}
        takes = encoder.config.takes
        folder = "images" if takes == "image" else takes
        self.store = FeatureCache(cache / folder if cache else None, identity, dtypes)

    def encode(self, contents: Sequence[Any], views: Sequence[int]) -> list[Item]:
        """One item for each of the files' ``contents``, as they are or preprocessed."""
        with self.disabled():  # one call, on every rank: its weights may be sharded
            out = self.encoder.encode(contents, views)
        items: list[Item] = []
        for i, view in enumerate(views):
            items.append({"pooled": out["pooled"][i : i + 1].numpy()})
            if "levels" in out and view == 0:
                items[i]["levels"] = out["levels"][i].flatten(0, 1).numpy()
        return items


class Encoding(Protocol):
    """What a frozen encoder makes of files, and where that is kept: `EncoderFeatures`, `EncoderStates`."""

    encoder: Encoder
    store: FeatureCache

    def encode(self, contents: Sequence[Any], views: Sequence[int]) -> list[Item]: ...


class InputFeatures:
    """What ``encodings`` make of the files of one input, which lie under ``root`` and are each read once for all of them.

    ``cache``: where what was read is noted (none: it is not).
    """

    def __init__(
        self,
        medium: Medium,
        encodings: Sequence[Encoding],
        root: Path,
        cache: Path | None,
        limits: Limits,
        bad: BadSamples | None = None,
    ):
        self.limits, self.bad, self.encodings = limits, bad, list(encodings)
        self.index = FileIndex(root, cache / "index" if cache else None, medium, limits)
        self._keys: dict[str, str | None] = {}
        self._sizes: dict[str, Size] = {}  # of pictures whose annotations state one
        self._notes: dict[str, list[str]] = defaultdict(list)  # how files are read, where not plainly: which
        self._decoded: dict[str, Decoded] = {}
        self.kept = [encoding for encoding in self.encodings if encoding.store.folder is not None]
        self.augments = any(encoding.encoder.views > 1 for encoding in encodings)
        self.shows = medium.name == "image"

    # which file holds what

    def key(self, file: str) -> str | None:
        """The content's address; None for a file that cannot be read (counted and named by the budget)."""
        if file not in self._keys:
            self.usable([file])
        return self._keys[file]

    def usable(self, files: Sequence[str]) -> list[bool]:
        """Which of ``files`` can be read. Those that the index does not know are read now, once, by threads."""
        unknown = self._recall(files)
        for file, found in zip(unknown, ahead(self._look, unknown), strict=True):
            self._learn(file, found)
        self.index.publish()
        return [self._keys[file] is not None for file in files]

    def forget(self) -> None:
        """Let go of what is known of files, so that memory is that of a block of them."""
        self._keys.clear()
        self._sizes.clear()
        self._decoded.clear()
        self.index.forget()

    def look_together(self, files: Sequence[str]) -> None:
        """Learn what ``files`` are, of which each rank reads a part; all ranks together.

        In the files' order, as a table's cells are read by groups of rows; what was decoded is kept, up to `HELD` bytes.
        """
        own = self._recall(sorted(files))[dist.rank() :: dist.world()]
        seen, held = [], 0
        for file, found in zip(own, ahead(self._look, own), strict=True):
            if not isinstance(found, DataError):
                if (held := held + found.nbytes) <= HELD:
                    self._decoded[file] = found
                found = found.facts()
            seen.append((file, found))
        for file, found in (pair for part in dist.gather(seen) for pair in part):
            self._learn(file, found)

    def _recall(self, files: Iterable[str]) -> list[str]:
        """Learn what the index knows of ``files``, and which are not there; returns the others."""
        unknown = [file for file in dict.fromkeys(files) if file not in self._keys]
        known = self.index.find(unknown)
        for file in unknown:
            if file in known:
                facts = known[file]
                self._learn(file, self._meant(file, facts) if facts else self._look(file))
        return [file for file in unknown if file not in known]

    def _look(self, file: str) -> Decoded | DataError:
        """The file, read and decoded, or what is wrong with it, which is the caller's to raise in the files' order."""
        try:
            return self._meant(file, self.index.read(file))
        except DataError as error:
            return error

    def _meant(self, file: str, found: Found) -> Found | DataError:
        """The file as its annotation means it, where this states a size."""
        try:
            return found.annotated(self._sizes[file], self.limits.pixels) if file in self._sizes else found
        except DataError as error:
            return error

    def _learn(self, file: str, found: Facts | DataError) -> None:
        """Let ``found`` be the file's content; DataError where another one was, and has been used as its."""
        if isinstance(found, DataError):
            if self.bad is None or self._keys.get(file):
                self.index.publish()
                raise found
            self.bad.skip(file, str(found))
            self._keys[file] = None
        elif file not in self._keys:
            self._keys[file] = found.digest
            if found.note:
                self._notes[found.note].append(file)
        elif self._keys[file] != found.digest:
            self.index.publish()  # it may be the index that was wrong, which the next start would believe again
            raise DataError(f"{found.where} was replaced while it was being used: leave the files alone, start again")

    def content(self, file: str) -> Any:
        """The file whose address is `key`. DataError where the file is not the same any more."""
        held = self._decoded.pop(file, None)
        read = self._look(file) if held is None else self._meant(file, held)
        if isinstance(read, DataError):
            raise read
        self._learn(file, read)
        return read.content()

    def expect(self, sizes: Mapping[str, Size]) -> None:
        """Read these files as annotations of these sizes mean them."""
        self._sizes.update(sizes)

    def say_notes(self) -> None:
        """One line for each way in which pictures differ from what their annotations say of them."""
        for note, files in self._notes.items():
            log.warning("%d pictures are read %s, which fits their annotations: %r first", len(files), note, files[0])
        self._notes.clear()

    # what is made of them

    def views(self, asked: int) -> int:
        """How many variants of a file there are: as many as asked for, or the file itself."""
        return asked if self.augments else 1

    def prepare(self, files: Sequence[str], views: int = 1, progress: Progress = no_progress) -> int:
        """Encode what is not in the cache yet, each file decoded once; returns how many encodings that were.

        Ranks that share a cache share the work: each takes every n-th file, and what then is still missing. A file
        is known by another rank's reading only where it is the same file by its times.
        """
        if not self.kept:
            return 0
        views = self.views(views)
        lacking, computed = self._lacking(files, views), 0
        if dist.world() > 1:
            every = list(dict.fromkeys(file for part in dist.gather(lacking) for file in part))
            own = set(lacking)
            mine = [file for file in every[dist.rank() :: dist.world()] if file in own]
            computed = self._encode(mine, views, progress, judge=False)
            for rows in dist.gather(self.index.rows):
                self.index.rows.update(rows)
            for encoding in self.kept:
                encoding.store.refresh()
            lacking = self._lacking(files, views)
        return computed + self._encode(lacking, views, progress)

    def _lacking(self, files: Sequence[str], views: int) -> list[str]:
        """The files that are unknown, or of which something is not in the cache."""
        unknown = set(self._recall(files))
        known = {f"{self._keys[file]}/{view}": file for file in files if self._keys.get(file) for view in range(views)}
        for encoding in self.kept:
            missing = encoding.store.missing(known, loading.holds_shards(encoding.encoder))
            unknown.update(known[key] for key in missing)
        return [file for file in dict.fromkeys(files) if file in unknown]

    def _encode(self, files: Sequence[str], views: int, progress: Progress, judge: bool = True) -> int:
        """Decode and preprocess in threads, a little ahead of the encoders; returns how many encodings were made.

        ``judge``: what cannot be read is counted; without, it is left unknown.
        """
        computed, size = 0, max(1, ENCODE_BATCH // views)
        chunks = [files[start : start + size] for start in range(0, len(files), size)]
        try:
            with closing(ahead(partial(self._draw, views), files)) as drawn:
                for chunk, own in dist.lockstep(chunks, ()):
                    found = dict(zip(chunk, drawn)) if own else {}  # noqa: B905 - zip takes the next ones of all
                    for file, (facts, _) in found.items():
                        if judge or not isinstance(facts, DataError):
                            self._learn(file, facts)
                    parts = [[pixels[number] for _, pixels in found.values()] for number in range(len(self.kept))]
                    made = sum(map(self._run, self.kept, parts))
                    computed += made
                    progress(made)
                    self.index.publish(PUBLISHED)
        finally:
            for encoding in self.kept:
                encoding.store.flush()
            self.index.publish()
        dist.barrier()
        return computed

    def _draw(self, views: int, file: str) -> tuple[Decoded | DataError, list[Drawn]]:
        """A file, and what each of the encodings lacks of it, preprocessed: in a thread."""
        found = self._look(file)
        if isinstance(found, DataError):
            return found, [{} for _ in self.kept]
        wanted = {f"{found.digest}/{view}": view for view in range(views)}
        return found, [
            {
                key: (encoding.encoder.preprocess(found.content(), view), view)
                for key, view in wanted.items()
                if key not in encoding.store
            }
            for encoding in self.kept
        ]

    def _run(self, encoding: Encoding, drawn: Sequence[Drawn]) -> int:
        """Encode and keep what was ``drawn``; returns how much that was. Encoders in shards run on all ranks at once."""
        wanted = {key: pixels for part in drawn for key, pixels in part.items() if key not in encoding.store}
        if wanted:
            pixels, views = zip(*wanted.values(), strict=True)
            encoding.store.add(dict(zip(wanted, encoding.encode(pixels, views), strict=True)))
        elif loading.holds_shards(encoding.encoder):
            encoding.encode([encoding.encoder.blank()], [0])
        return len(wanted)

    def items(self, encoding: Encoding, files: Sequence[str], views: Sequence[int]) -> list[Item]:
        """What ``encoding`` makes of the files' ``views``; what is not kept is made now."""
        wanted = [(file, view if self.augments else 0) for file, view in zip(files, views, strict=True)]
        keys = [f"{self.key(file)}/{view}" for file, view in wanted]
        by_key = dict(zip(keys, wanted, strict=True))

        def compute(absent: Sequence[str]) -> dict[str, Item]:
            contents = list(ahead(self.content, [by_key[key][0] for key in absent]))
            return dict(zip(absent, encoding.encode(contents, [by_key[key][1] for key in absent]), strict=True))

        return encoding.store.read(keys, compute, loading.holds_shards(encoding.encoder))

    def pooled(self, encoding: Encoding, files: Sequence[str], views: Sequence[int]) -> Tensor:
        """(B, e) float32: the features that an encoder makes."""
        return torch.from_numpy(np.concatenate([item["pooled"] for item in self.items(encoding, files, views)]))

    def levels(self, encoding: Encoding, files: Sequence[str]) -> list[Tensor]:
        """The tokens of every level of an encoder that has levels: a list of (B, prefix + N, c) float32."""
        encoder = encoding.encoder
        count, tokens_each = len(encoder.config.levels), encoder.tokens
        stacked = np.stack([item["levels"] for item in self.items(encoding, files, [0] * len(files))])
        return list(torch.from_numpy(stacked.astype(np.float32)).unflatten(1, (count, tokens_each)).unbind(1))

    def states(self, encoding: Encoding, files: Sequence[str], views: Sequence[int]) -> list[tuple[Tensor, int]]:
        """What enters the changed layers of an encoder (`EncoderStates`): each file's (N, c) float32, how many are shown."""
        items = self.items(encoding, files, views)
        rows = [torch.from_numpy(item["states"].astype(np.float32)) for item in items]
        return [
            (row, int(item["shown"].item()) if "shown" in item else len(row)) for row, item in zip(rows, items, strict=True)
        ]
