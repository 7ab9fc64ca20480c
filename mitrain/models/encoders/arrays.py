"""Features of one's own: arrays that other programs made, pooled over time. Nothing is computed but that."""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mitrain.models.encoders.base import Encoder
from mitrain.models.encoders.config import EncoderConfig


class ArrayConfig(EncoderConfig):
    """Features of one's own, arrays (e,), which are one row, or (T, e). ``key``: where the sample's path does not say it
    (see `mitrain.data.arrays`)."""

    takes: Literal["features"] = "features"
    name: str = "features"
    width: int = Field(ge=1, le=1 << 20)
    pool: Literal["mean", "mean+std", "max", "last"] = "mean"
    key: str | None = None


class ArrayEncoder(Encoder):
    """See `Encoder`; without weights."""

    family = "features"

    def __init__(self, config: ArrayConfig, *_: Any):
        nn.Module.__init__(self)
        self.config, self.model, self.settings, self.source, self.depth = config, nn.Module(), None, None, 0
        self.width = config.width * (2 if config.pool == "mean+std" else 1)

    def preprocess(self, decoded: Any, view: int = 0) -> Tensor:
        """(e,) float32: the rows of a `mitrain.data.arrays.Array`, pooled."""
        rows = torch.from_numpy(np.atleast_2d(decoded.values)).double()
        parts = {
            "mean": lambda: [rows.mean(0)],
            "mean+std": lambda: [rows.mean(0), rows.std(0, correction=0)],
            "max": lambda: [rows.amax(0)],
            "last": lambda: [rows[-1]],
        }
        return torch.cat(parts[self.config.pool]()).float()

    @property
    def reads(self) -> dict[str, Any]:
        return {"key": self.config.key, "width": self.config.width}

    def blank(self) -> Tensor:
        return torch.zeros(self.width)

    def _pooled(self, items: Any) -> Tensor:
        return torch.stack(list(items))

    def _preprocessing(self) -> Any:
        return {"pool": self.config.pool, "width": self.config.width}

    def identity(self) -> dict[str, Any]:
        return {"takes": self.config.takes, **self._preprocessing()}

    def base(self) -> dict[str, Any]:
        return {"preprocess": self._preprocessing()}
