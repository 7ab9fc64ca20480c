"""Frozen encoders of video: VideoMAE and ViViT, or any image encoder over the frames.

Shapes: B videos, N frames, S side in pixels, T tokens, D hidden width, e feature width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModel

from mitrain.core.errors import ConfigError, ModelError
from mitrain.models.encoders.base import Encoder, Pool, cut_to_layer, load, over_time, top_layer
from mitrain.models.encoders.config import EncoderConfig
from mitrain.models.encoders.image import LONGEST, VIEWS, ImageConfig, ImageEncoder, preprocessing

CLASS_TOKENS = {"videomae": 0, "vivit": 1}
"""The families that read frames together, and how many tokens stand before those of the frames."""
FRAMES = 8  # of a video that an image encoder reads
TOGETHER = 64  # frames that are read at once, but for a video that has more


class VideoConfig(EncoderConfig):
    """One frozen encoder of video, or an image encoder that reads the frames one by one.

    ``pool: auto`` is ViViT's class token, the mean over VideoMAE's tokens, and the mean and standard deviation over time
    of what an image encoder makes of the frames.
    """

    takes: Literal["video"] = "video"
    frames: int | None = Field(None, ge=1, le=256)
    size: int | None = Field(None, ge=14, le=LONGEST)
    resize: Literal["squash", "pad"] = "squash"
    pool: Pool = "auto"
    image_pool: Literal["auto", "cls", "mean", "cls+mean"] = "auto"


class VideoEncoder(Encoder):
    """See `Encoder`. ``frames``: how many of a video it takes. ``vision``: the image encoder that reads them, or none."""

    views = VIEWS

    def _make(self, settings: Any, source: str | Path, *where: Any) -> None:
        if self.family in CLASS_TOKENS:
            self._take_together(settings, source, *where)
        else:
            self._take_one_by_one(source, *where)
        self.width = self._wide * (2 if self.pool == "mean+std" else 1)

    def _take_together(self, settings: Any, source: str | Path, *where: Any) -> None:
        self.vision, self.frames = None, settings.num_frames
        for name, given, wanted in (
            ("frames", self.config.frames, settings.num_frames),
            ("size", self.config.size, settings.image_size),
        ):
            if given not in (None, wanted):
                raise ConfigError(f"{self.config.label} was made for {name}={wanted}, not {given}: leave it out")
        if self.config.image_pool != "auto":
            raise ConfigError(f"{self.config.label} reads frames together: image_pool is for image encoders, leave it out")
        self.settings, self.depth, self._wide = settings, settings.num_hidden_layers, settings.hidden_size
        used = lambda name: "pooler" not in name.split(".")  # noqa: E731
        self.model = load(self.config, source, AutoModel, settings, used, *where)
        cut_to_layer(self.model, self.config, self.depth)
        self._of_frame = preprocessing(self.config, settings, source, self.family)
        own = "cls" if CLASS_TOKENS[self.family] else "mean"
        self.pool = own if self.config.pool == "auto" else self.config.pool

    def _take_one_by_one(self, source: str | Path, *where: Any) -> None:
        given = self.config.model_dump(include={"name", "size", "layer", "resize", "shape"})
        self.vision = ImageEncoder(ImageConfig(**given, pool=self.config.image_pool), source, *where)
        self.model, self.settings, self._of_frame = self.vision.model, self.vision.settings, self.vision.preprocess
        self.depth, self._wide, self.frames = self.vision.depth, self.vision.width, self.config.frames or FRAMES
        self.pool = "mean+std" if self.config.pool == "auto" else self.config.pool

    def preprocess(self, decoded: Any, view: int = 0) -> Tensor:
        """(N, 3, S, S) float32: the frames of a `mitrain.data.video.Video`, all in one variant."""
        if len(decoded.frames) != self.frames:
            raise ModelError(f"{self.config.label} takes {self.frames} frames, not {len(decoded.frames)}")
        return torch.stack([self._of_frame(frame, view) for frame in decoded.frames])

    @property
    def reads(self) -> dict[str, Any]:
        return {"frames": self.frames}

    def blank(self) -> Tensor:
        return torch.zeros(self.frames, 3, self._of_frame.size, self._of_frame.size)

    def _groups(self, items: Sequence[Tensor]) -> list[list[int]]:
        count = max(1, TOGETHER // self.frames)
        return [list(range(i, min(i + count, len(items)))) for i in range(0, len(items), count)]

    def _pooled(self, items: Sequence[Tensor]) -> Tensor:
        if self.vision is not None:
            rows = self.vision.encode(list(torch.cat(list(items))))["pooled"]
            return over_time(rows.unflatten(0, (len(items), -1)), [self.frames] * len(items), self.pool)
        with top_layer(self.model) as seen:
            final = self.model(pixel_values=self._batch(items)).last_hidden_state
        states = seen[-1] if self.config.layer else final
        if self.pool == "cls":
            return states[:, 0]
        states = states[:, CLASS_TOKENS[self.family] :]
        return over_time(states, [states.shape[1]] * len(items), self.pool)

    def _preprocessing(self) -> Any:
        used = self._of_frame
        return [used.size, list(used.mean), list(used.std), used.resize, self.frames]

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "image_pool": self.config.image_pool}
