"""What the frozen encoders say of images, computed once (or, with the cache off, whenever it is asked for).

Shapes: B samples, e width of the infused feature (all encoders concatenated), N patches, c channels.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from mitrain.core import dist
from mitrain.core.config import Section
from mitrain.core.errors import DataError
from mitrain.data.cache import FeatureCache
from mitrain.data.images import BadSamples, Decoded, Facts, Size
from mitrain.data.index import PictureIndex, ahead
from mitrain.data.segments import Item
from mitrain.models import VisionEncoder, loading
from mitrain.models.vision import VIEWS

log = logging.getLogger(__name__)

Progress = Callable[[int], object]
Found = TypeVar("Found", bound=Facts)
Drawn = dict[str, tuple[Tensor, int]]
"""Preprocessed pictures and their views by key."""

ENCODE_BATCH = 8  # on a CPU larger batches only cost memory traffic
PUBLISHED = 8192  # pictures that an interruption lets be read again, at most


def no_progress(done: int) -> None:
    """Say nothing."""


class FeatureConfig(Section):
    """How the infused feature is made from the encoders' output.

    ``normalize``: per dimension to zero mean and unit variance over the training images, then scaled so that the vector's
    norm is about ``norm``; or to that length (l2). ``views``: deterministic variants of each training image (1 = the image
    itself). ``eval_views``: how many of them are averaged at evaluation. ``noise``: standard deviation of Gaussian noise
    and ``dropout``: share of dimensions zeroed, in training only.
    """

    normalize: Literal["standardize", "l2", "none"] = "standardize"
    norm: float = Field(4.0, gt=0)
    views: int = Field(1, ge=1, le=VIEWS)
    eval_views: int = Field(1, ge=1, le=VIEWS)
    noise: float = Field(0.0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class FeatureNorm(nn.Module):
    """Feature (B, e) → infused feature (B, e). Its statistics are buffers: an adapter carries them with it."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, config: FeatureConfig):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, features: Tensor) -> None:
        """Take mean and standard deviation from ``features`` (samples, e)."""
        if self.config.normalize != "standardize":
            return
        features = features.double()
        std = features.std(0, correction=0).clamp_min(1e-6)
        self.mean.copy_(features.mean(0))
        self.scale.copy_(self.config.norm / len(self.mean) ** 0.5 / std)

    def forward(self, features: Tensor) -> Tensor:
        if self.config.normalize == "l2":
            return nn.functional.normalize(features, dim=-1) * self.config.norm
        return (features - self.mean) * self.scale

    def disturb(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Training noise on normalised features (B, e)."""
        if self.config.noise:
            unit = self.config.norm / features.shape[-1] ** 0.5
            features = features + self.config.noise * unit * torch.randn(features.shape, generator=generator).to(
                features
            )
        if self.config.dropout:
            keep = torch.rand(features.shape, generator=generator).to(features) >= self.config.dropout
            features = features * keep / (1 - self.config.dropout)
        return features


class EncoderFeatures:
    """What one encoder makes of pictures, kept by their content and view: the pooled feature and, of view 0, the levels.

    ``disabled`` takes off what changes the encoder meanwhile.
    """

    def __init__(self, encoder: VisionEncoder, cache: Path | None, disabled: Callable[[], AbstractContextManager[Any]]):
        self.encoder, self.disabled = encoder, disabled
        identity = encoder.identity() if cache else {}
        dtypes = {"pooled": "float32", "levels": "float16"}
        self.store = FeatureCache(cache / "images" if cache else None, identity, dtypes)

    def encode(self, pictures: Sequence[Image.Image | Tensor], views: Sequence[int]) -> list[Item]:
        """One item for each of ``pictures``, as it is or preprocessed."""
        with self.disabled():  # one call, on every rank: its weights may be sharded
            out = self.encoder.encode(pictures, views)
        items: list[Item] = []
        for i, view in enumerate(views):
            items.append({"pooled": out["pooled"][i : i + 1].numpy()})
            if "levels" in out and view == 0:
                items[i]["levels"] = out["levels"][i].flatten(0, 1).numpy()
        return items


class PictureEncoding(Protocol):
    """What a frozen encoder makes of pictures, and where that is kept: `EncoderFeatures`, `PictureStates`."""

    encoder: VisionEncoder
    store: FeatureCache

    def encode(self, pictures: Sequence[Image.Image | Tensor], views: Sequence[int]) -> list[Item]: ...


class ImageFeatures:
    """The frozen encoders' view of image files under ``root``; ``disabled`` takes off what changes an encoder meanwhile.

    ``also``: what else is made of each picture while it is decoded.
    """

    def __init__(
        self,
        encoders: Sequence[VisionEncoder],
        root: Path,
        cache: Path | None,
        max_pixels: int,
        bad: BadSamples | None = None,
        disabled: Callable[[], AbstractContextManager[Any]] = nullcontext,
        also: Sequence[PictureEncoding] = (),
    ):
        self.max_pixels, self.bad = max_pixels, bad
        self.index = PictureIndex(root, cache / "index" if cache else None, max_pixels)
        self._keys: dict[str, str | None] = {}
        self._sizes: dict[str, Size] = {}  # of pictures whose annotations state one
        self._notes: dict[str, list[str]] = defaultdict(list)  # how pictures are read, where not plainly: which
        self.features = [EncoderFeatures(encoder, cache, disabled) for encoder in encoders]
        self.encodings: list[PictureEncoding] = [*self.features, *also]
        self.kept = [encoding for encoding in self.encodings if encoding.store.folder is not None]

    @property
    def width(self) -> int:
        return sum(features.encoder.width for features in self.features)

    # which picture lies where

    def key(self, image: str) -> str | None:
        """The content's address; None for a file that cannot be read (counted and named by the budget)."""
        if image not in self._keys:
            self.usable([image])
        return self._keys[image]

    def usable(self, images: Sequence[str]) -> list[bool]:
        """Which of ``images`` can be read. Those that the index does not know are read now, once, by threads."""
        unknown = self._recall(images)
        for image, found in zip(unknown, ahead(self._look, unknown), strict=True):
            self._learn(image, found)
        self.index.publish()
        return [self._keys[image] is not None for image in images]

    def _recall(self, images: Iterable[str]) -> list[str]:
        """Learn what the index knows of ``images``, and which are not there; returns the others."""
        unknown = [image for image in dict.fromkeys(images) if image not in self._keys]
        known = self.index.find(unknown)
        for image in unknown:
            if image in known:
                facts = known[image]
                self._learn(image, self._meant(image, facts) if facts else self._look(image))
        return [image for image in unknown if image not in known]

    def _look(self, image: str) -> Decoded | DataError:
        """The picture, read and decoded, or what is wrong with it, which is the caller's to raise in the pictures' order."""
        try:
            return self._meant(image, self.index.read(image))
        except DataError as error:
            return error

    def _meant(self, image: str, found: Found) -> Found | DataError:
        """The picture as its annotation means it, where this states a size."""
        try:
            return found.annotated(self._sizes[image], self.max_pixels) if image in self._sizes else found
        except DataError as error:
            return error

    def _learn(self, image: str, found: Facts | DataError) -> None:
        """Let ``found`` be the picture's content; DataError where another one was, and has been used as its."""
        if isinstance(found, DataError):
            if self.bad is None or self._keys.get(image):
                self.index.publish()
                raise found
            self.bad.skip(image, str(found))
            self._keys[image] = None
        elif image not in self._keys:
            self._keys[image] = found.digest
            if found.note:
                self._notes[found.note].append(image)
        elif self._keys[image] != found.digest:
            self.index.publish()  # it may be the index that was wrong, which the next start would believe again
            raise DataError(
                f"{found.where} was replaced while it was being used: leave the pictures alone, start again"
            )

    def picture(self, image: str) -> Image.Image:
        """The picture whose address is `key`. DataError where the file is not the same any more."""
        read = self._look(image)
        if isinstance(read, DataError):
            raise read
        self._learn(image, read)
        return read.upright()

    def readable(self, samples: Sequence[Any], views: int = 0, progress: Progress = no_progress) -> list[Any]:
        """The samples whose picture and mask can be read and fit together; the budget counts and names the others.

        ``views``: so many of each picture are encoded at once (`prepare`), while it is decoded.
        """
        kept = []
        self._sizes.update({s.image: s.size for s in samples if getattr(s, "size", None)})
        if views:
            self.prepare(sorted({s.image for s in samples}), views, progress)
        for sample, usable in zip(samples, self.usable([s.image for s in samples]), strict=True):
            fault = sample.fault()
            if fault and self.bad is not None:
                self.bad.skip(sample.id, fault)
            elif usable:
                kept.append(sample)
        if self.bad is not None:
            self.bad.check_share(len(samples) - len(kept), len(samples))
        self._say_notes()
        return kept

    def _say_notes(self) -> None:
        """One line for each way in which pictures differ from what their annotations say of them."""
        for note, images in self._notes.items():
            log.warning("%d pictures are read %s, which fits their annotations: %r first", len(images), note, images[0])
        self._notes.clear()

    # what is made of them

    def prepare(self, images: Sequence[str], views: int = 1, progress: Progress = no_progress) -> int:
        """Encode what is not in the cache yet, each picture decoded once; returns how many encodings that were.

        Ranks that share a cache share the work: each takes every n-th picture, and what then is still missing. A picture
        is known by another rank's reading only where it is the same file by its times.
        """
        if not self.kept:
            return 0
        lacking, computed = self._lacking(images, views), 0
        if dist.world() > 1:
            every = list(dict.fromkeys(image for part in dist.gather(lacking) for image in part))
            own = set(lacking)
            mine = [image for image in every[dist.rank() :: dist.world()] if image in own]
            computed = self._encode(mine, views, progress, judge=False)
            for rows in dist.gather(self.index.rows):
                self.index.rows.update(rows)
            for encoding in self.kept:
                encoding.store.refresh()
            lacking = self._lacking(images, views)
        return computed + self._encode(lacking, views, progress)

    def _lacking(self, images: Sequence[str], views: int) -> list[str]:
        """The pictures that are unknown, or of which something is not in the cache."""
        unknown = set(self._recall(images))
        known = {
            f"{self._keys[image]}/{view}": image for image in images if self._keys.get(image) for view in range(views)
        }
        for encoding in self.kept:
            missing = encoding.store.missing(known, loading.holds_shards(encoding.encoder))
            unknown.update(known[key] for key in missing)
        return [image for image in dict.fromkeys(images) if image in unknown]

    def _encode(self, images: Sequence[str], views: int, progress: Progress, judge: bool = True) -> int:
        """Decode and preprocess in threads, a little ahead of the encoders; returns how many encodings were made.

        ``judge``: what cannot be read is counted; without, it is left unknown.
        """
        computed, size = 0, max(1, ENCODE_BATCH // views)
        chunks = [images[start : start + size] for start in range(0, len(images), size)]
        try:
            with closing(ahead(partial(self._draw, views), images)) as drawn:
                for chunk, own in dist.lockstep(chunks, ()):
                    found = dict(zip(chunk, drawn)) if own else {}  # noqa: B905 - zip takes the next ones of all
                    for image, (facts, _) in found.items():
                        if judge or not isinstance(facts, DataError):
                            self._learn(image, facts)
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

    def _draw(self, views: int, image: str) -> tuple[Decoded | DataError, list[Drawn]]:
        """A picture, and what each of the encodings lacks of it, preprocessed: in a thread."""
        found = self._look(image)
        if isinstance(found, DataError):
            return found, [{} for _ in self.kept]
        wanted = {f"{found.digest}/{view}": view for view in range(views)}
        return found, [
            {
                key: (encoding.encoder.preprocess(found.upright(), view), view)
                for key, view in wanted.items()
                if key not in encoding.store
            }
            for encoding in self.kept
        ]

    def _run(self, encoding: PictureEncoding, drawn: Sequence[Drawn]) -> int:
        """Encode and keep what was ``drawn``; returns how much that was. Encoders in shards run on all ranks at once."""
        wanted = {key: pixels for part in drawn for key, pixels in part.items() if key not in encoding.store}
        if wanted:
            pixels, views = zip(*wanted.values(), strict=True)
            encoding.store.add(dict(zip(wanted, encoding.encode(pixels, views), strict=True)))
        elif loading.holds_shards(encoding.encoder):
            encoding.encode([Image.new("RGB", (8, 8))], [0])
        return len(wanted)

    def items(self, encoding: PictureEncoding, images: Sequence[str], views: Sequence[int]) -> list[Item]:
        """What ``encoding`` makes of the pictures' ``views``; what is not kept is made now."""
        wanted = list(zip(images, views, strict=True))
        keys = [f"{self.key(image)}/{view}" for image, view in wanted]
        by_key = dict(zip(keys, wanted, strict=True))

        def compute(absent: Sequence[str]) -> dict[str, Item]:
            pictures = list(ahead(self.picture, [by_key[key][0] for key in absent]))
            return dict(zip(absent, encoding.encode(pictures, [by_key[key][1] for key in absent]), strict=True))

        return encoding.store.read(keys, compute, loading.holds_shards(encoding.encoder))

    def pooled(self, images: Sequence[str], views: Sequence[int] | None = None) -> Tensor:
        """(B, e) float32: all encoders' global features side by side."""
        views = views or [0] * len(images)
        rows = [
            np.concatenate([item["pooled"] for item in self.items(encoding, images, views)])
            for encoding in self.features
        ]
        return torch.from_numpy(np.concatenate(rows, axis=1))

    def pooled_of_all(self, images: Sequence[str]) -> Tensor:
        """`pooled` of any number of pictures: a few are encoded at a time where nothing is kept, or it is damaged."""
        starts = range(0, len(images), ENCODE_BATCH)
        return torch.cat([self.pooled(images[start : start + ENCODE_BATCH]) for start in starts])

    def averaged(self, images: Sequence[str], views: int) -> Tensor:
        """(B, e): the mean over the first ``views`` variants."""
        return torch.stack([self.pooled(images, [view] * len(images)) for view in range(views)]).mean(0)

    def levels(self, images: Sequence[str]) -> list[Tensor]:
        """The patch tokens of every level of the encoders that have levels: a list of (B, prefix + N, c) float32."""
        tokens = []
        for encoding in self.features:
            encoder = encoding.encoder
            if encoder.config.levels:
                count, tokens_each = len(encoder.config.levels), encoder.prefix_tokens + encoder.grid**2
                stacked = np.stack([item["levels"] for item in self.items(encoding, images, [0] * len(images))])
                batch = torch.from_numpy(stacked.astype(np.float32)).unflatten(1, (count, tokens_each))
                tokens += list(batch.unbind(1))
        return tokens
