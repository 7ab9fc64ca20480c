"""What the frozen encoders say of images, computed once (or, with the cache off, whenever it is asked for).

Shapes: B samples, e width of the infused feature (all encoders concatenated), N patches, c channels.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from mitrain.core.config import Section
from mitrain.core.errors import DataError
from mitrain.data.cache import FeatureCache
from mitrain.data.images import BadSamples, Decoded, Size, read_image
from mitrain.data.segments import Item
from mitrain.models import VisionEncoder, loading
from mitrain.models.vision import VIEWS

log = logging.getLogger(__name__)

Progress = Callable[[int], object]
ENCODE_BATCH = 8  # on a CPU larger batches only cost memory traffic


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
        """Take mean and spread from ``features`` (samples, e)."""
        if self.config.normalize != "standardize":
            return
        features = features.double()
        spread = features.std(0, correction=0).clamp_min(1e-6)
        self.mean.copy_(features.mean(0))
        self.scale.copy_(self.config.norm / len(self.mean) ** 0.5 / spread)

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


class ImageFeatures:
    """The frozen encoders' view of image files under ``root``; ``disabled`` takes off what changes an encoder meanwhile."""

    def __init__(
        self,
        encoders: Sequence[VisionEncoder],
        root: Path,
        cache: Path | None,
        max_pixels: int,
        bad: BadSamples | None = None,
        disabled: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.encoders, self.root, self.max_pixels, self.bad, self.disabled = encoders, root, max_pixels, bad, disabled
        self._keys: dict[str, str | None] = {}
        self._sizes: dict[str, Size] = {}  # of pictures whose annotations state one
        self._notes: dict[str, list[str]] = defaultdict(list)  # how pictures are read, where not plainly: which
        dtypes = {"pooled": "float32", "levels": "float16"}
        self.cached = cache is not None
        places = [cache / "images" if cache else None for _ in encoders]
        self.stores = [
            FeatureCache(place, e.identity() if cache else {}, dtypes)
            for place, e in zip(places, encoders, strict=True)
        ]

    @property
    def width(self) -> int:
        return sum(encoder.width for encoder in self.encoders)

    def key(self, image: str) -> str | None:
        """The content's address; None for a file that cannot be read (counted and named by the budget)."""
        if image not in self._keys:
            try:
                found = self._read(image)
                self._keys[image] = found.digest
                if found.note:
                    self._notes[found.note].append(image)
            except DataError as error:
                if self.bad is None:
                    raise
                self.bad.skip(image, str(error))
                self._keys[image] = None
        return self._keys[image]

    def picture(self, image: str) -> Image.Image:
        """The picture whose address is `key`. DataError where the file is not the same any more."""
        found = self._read(image)
        if found.digest != self._keys.setdefault(image, found.digest):
            raise DataError(
                f"{found.where} was replaced while it was being used: leave the pictures alone, start again"
            )
        return found.upright()

    def _read(self, image: str) -> Decoded:
        """The picture, as its annotation means it where this states a size."""
        found = read_image(self.root, image, self.max_pixels)
        return found.annotated(self._sizes[image], self.max_pixels) if image in self._sizes else found

    def usable(self, images: Sequence[str]) -> list[bool]:
        """Which of ``images`` can be read."""
        return [self.key(image) is not None for image in images]

    def readable(self, samples: Sequence[Any]) -> list[Any]:
        """The samples whose picture and mask can be read and fit together; the budget counts and names the others."""
        kept = []
        self._sizes.update({s.image: s.size for s in samples if getattr(s, "size", None)})
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

    def prepare(self, images: Sequence[str], views: int = 1, progress: Progress = no_progress) -> int:
        """Encode what is not in the cache yet; returns how many encodings that were."""
        if not self.cached:
            return 0
        computed = 0
        for encoder, store in zip(self.encoders, self.stores, strict=True):
            by_key = {f"{self.key(image)}/{view}": (image, view) for view in range(views) for image in images}
            computed += store.fill(by_key, partial(self._encode_keys, encoder, by_key), ENCODE_BATCH, progress)
        return computed

    def _encode_keys(
        self, encoder: VisionEncoder, by_key: dict[str, tuple[str, int]], keys: Sequence[str]
    ) -> dict[str, Item]:
        return self._encode(encoder, [by_key[key] for key in keys], keys)

    def _encode(
        self, encoder: VisionEncoder, wanted: Sequence[tuple[str, int]], keys: Sequence[str]
    ) -> dict[str, Item]:
        images = [self.picture(image) for image, _ in wanted]
        with self.disabled():  # one call, on every rank: its weights may be sharded
            out = encoder.encode(images, [view for _, view in wanted])
        items: dict[str, Item] = {}
        for i, (key, (_, view)) in enumerate(zip(keys, wanted, strict=True)):
            items[key] = {"pooled": out["pooled"][i : i + 1].numpy()}
            if "levels" in out and view == 0:
                items[key]["levels"] = out["levels"][i].flatten(0, 1).numpy()
        return items

    def _items(self, index: int, images: Sequence[str], views: Sequence[int]) -> list[Item]:
        encoder, store = self.encoders[index], self.stores[index]
        wanted = [(image, view) for image, view in zip(images, views, strict=True)]
        by_key = {f"{self.key(image)}/{view}": (image, view) for image, view in wanted}
        keys = [f"{self.key(image)}/{view}" for image, view in wanted]
        return store.read(keys, partial(self._encode_keys, encoder, by_key), loading.holds_shards(encoder))

    def pooled(self, images: Sequence[str], views: Sequence[int] | None = None) -> Tensor:
        """(B, e) float32: all encoders' global features side by side."""
        views = views or [0] * len(images)
        rows = [
            np.concatenate([item["pooled"] for item in self._items(i, images, views)])
            for i in range(len(self.encoders))
        ]
        return torch.from_numpy(np.concatenate(rows, axis=1))

    def averaged(self, images: Sequence[str], views: int) -> Tensor:
        """(B, e): the mean over the first ``views`` variants."""
        return torch.stack([self.pooled(images, [view] * len(images)) for view in range(views)]).mean(0)

    def levels(self, images: Sequence[str]) -> list[Tensor]:
        """The patch tokens of every level of the encoders that have levels: a list of (B, prefix + N, c) float32."""
        tokens = []
        for i, encoder in enumerate(self.encoders):
            if encoder.config.levels:
                count, tokens_each = len(encoder.config.levels), encoder.prefix_tokens + encoder.grid**2
                stacked = np.stack([item["levels"] for item in self._items(i, images, [0] * len(images))])
                batch = torch.from_numpy(stacked.astype(np.float32)).unflatten(1, (count, tokens_each))
                tokens += list(batch.unbind(1))
        return tokens
