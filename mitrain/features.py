"""What the frozen encoders say of images, computed once (or, with the cache off, whenever it is asked for).

Shapes: B samples, e width of the infused feature (all encoders concatenated), N patches, c channels.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mitrain.backbones import VisionEncoder
from mitrain.backbones.vision import VIEWS
from mitrain.config import Section
from mitrain.data.cache import FeatureCache, Item
from mitrain.data.images import BadSamples, open_image
from mitrain.errors import DataError

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
    """The frozen encoders' view of image files under ``root``; ``aside`` takes off what changes an encoder meanwhile."""

    def __init__(
        self,
        encoders: Sequence[VisionEncoder],
        root: Path,
        cache: Path | None,
        max_pixels: int,
        bad: BadSamples | None = None,
        aside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.encoders, self.root, self.max_pixels, self.bad, self.aside = encoders, root, max_pixels, bad, aside
        self._keys: dict[str, str | None] = {}
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
                open_image(self.root, image, self.max_pixels)
                self._keys[image] = hashlib.sha256((self.root / image).read_bytes()).hexdigest()
            except DataError as error:
                if self.bad is None:
                    raise
                self.bad.skip(image, str(error))
                self._keys[image] = None
        return self._keys[image]

    def usable(self, images: Sequence[str]) -> list[bool]:
        """Which of ``images`` can be read."""
        return [self.key(image) is not None for image in images]

    def readable(self, samples: Sequence[Any]) -> list[Any]:
        """The samples whose picture and mask can be read; the budget counts and names the others."""
        kept = []
        for sample, usable in zip(samples, self.usable([s.image for s in samples]), strict=True):
            fault = sample.fault()
            if fault and self.bad is not None:
                self.bad.skip(sample.id, fault)
            elif usable:
                kept.append(sample)
        return kept

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
        images = [open_image(self.root, image, self.max_pixels) for image, _ in wanted]
        with self.aside():  # one call, on every rank: its weights may be sharded
            out = encoder.encode(images, [view for _, view in wanted])
        items: dict[str, Item] = {}
        for i, (key, (_, view)) in enumerate(zip(keys, wanted, strict=True)):
            items[key] = {"pooled": out["pooled"][i : i + 1].numpy()}
            if "levels" in out and view == 0:
                items[key]["levels"] = out["levels"][i].flatten(0, 1).numpy()
        return items

    def _items(self, index: int, images: Sequence[str], views: Sequence[int]) -> list[Item]:
        encoder, store = self.encoders[index], self.stores[index]
        keys = [f"{self.key(image)}/{view}" for image, view in zip(images, views, strict=True)]
        absent = [i for i, key in enumerate(keys) if key not in store]
        if absent:
            wanted = [(images[i], views[i]) for i in absent]
            new = {k: store.rounded(v) for k, v in self._encode(encoder, wanted, [keys[i] for i in absent]).items()}
        return [store[key] if key in store else new[key] for key in keys]

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
