"""Segmenting what an expression refers to: the language model reads the text, a small decoder the image's patches.

The (infused) text state conditions the decoder (MiT §3; its release calls this the referring-segmentation head).

Shapes: B samples, T tokens, D hidden width, N patches, c channels, h × w the decoder's output, H × W an image's own size.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError
from mitrain.models import costs
from mitrain.models.batch import Picture
from mitrain.tasks import decoders, masks
from mitrain.tasks.base import Batch, Parts, Prediction, Task
from mitrain.tasks.readout import See, read_out, runs_text, statistics
from mitrain.tasks.template import frame_of, template_with

Readout = Literal["last", "mean", "cls", "embeddings"]


class SegmentConfig(Section, kind="task", name="segment"):
    """``readout``: what of the text conditions the decoder, concatenated: the last token's state (published), the mean over
    tokens, the mean of the input embeddings. ``film``: modulate the first level (published) or every level. ``coords``:
    give the decoder the patches' coordinates. ``loss_size``: side of the masks in the loss, in pixels."""

    template: template_with("expression") = "{expression}"
    readout: tuple[Readout, ...] = ("last",)
    decoder: Literal["film", "unet"] = "film"
    dim: int = Field(64, ge=4, le=1 << 16)
    heads: int = Field(4, ge=1, le=1 << 10)
    ffn: int = Field(2048, ge=4, le=1 << 18)
    film: Literal["first", "every"] = "first"
    coords: bool = False
    loss: Literal["ce", "bce", "focal", "dice", "ce+dice", "bce+dice", "focal+dice"] = "ce"
    unet_width: int = Field(512, ge=1, le=1 << 16)
    loss_size: int = Field(56, ge=8, le=1024)


class SegmentTask(Task):
    """mask = decoder(patch tokens of several encoder levels; condition = standardised read-outs of the text)."""

    metric = "oiou"
    decodes = True
    shuffles = "expressions"
    columns = (("oIoU", "oiou"), ("mIoU", "miou"), ("P@0.5", "precision@0.5"))
    controls = ("shuffle", "no-image")

    def __init__(
        self, config: SegmentConfig, parts: Parts, level_widths: Sequence[int], grid: int, patch: int, prefix: int
    ):
        super().__init__(parts)
        if not level_widths:
            raise ConfigError(
                "the task 'segment' reads patch tokens: give model.vision levels, for example levels=[10,7,4]"
            )
        if not config.readout:
            raise ConfigError("task.readout is empty: give last, mean or embeddings")
        self.config, self.grid = config, (grid, grid)
        self.classes = 2 if config.loss.startswith("ce") else 1
        width = parts.text.width * len(config.readout)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        shape = {
            "level_widths": level_widths,
            "condition_width": width,
            "classes": self.classes,
            "prefix_tokens": prefix,
        }
        if config.decoder == "unet":
            self.decoder: nn.Module = decoders.UnetDecoder(width=config.unet_width, **shape)
        else:
            chosen = config.model_dump(include={"dim", "heads", "ffn", "film", "coords"})
            self.decoder = decoders.FilmDecoder(patch=patch, **chosen, **shape)
        frame = frame_of(config.template)
        self._ids = cache(lambda text: parts.text.tokens(text, frame=frame))

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        if not runs_text(self.config.readout):
            return []
        return [self._ids(expression) for expression in sorted({s.expression for s in samples})]

    def tokens(self, samples: Sequence[Any]) -> int:
        return sum(len(self._ids(s.expression)) for s in samples)

    def condition(self, expressions: Sequence[str], picture: Picture | None) -> Tensor:
        """(B, D · read-outs): what the text says, standardised per dimension."""
        rows = [self._ids(expression) for expression in expressions]
        parts = read_out(self.parts, rows, self.config.readout, picture)
        return (torch.cat([parts[name] for name in self.config.readout], -1) - self.mean) * self.scale

    @torch.no_grad()
    def fit(self, samples: Sequence[Any], see: See | None = None) -> None:
        """Mean and spread of the frozen read-outs over the training expressions."""
        rows = [self._ids(expression) for expression in sorted({s.expression for s in samples})[:2048]]
        mean, scale = statistics(self.parts, self.config.readout, 0, rows)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def logits(self, batch: Batch) -> Tensor:
        """(B, classes, h, w)."""
        condition = self.condition([s.expression for s in batch.samples], batch.picture)
        return self.decoder(batch.levels, condition, self.grid)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        size = self.config.loss_size
        logits = decoders.resize(self.logits(batch), (size, size))
        targets = torch.stack([self._target(s) for s in batch.samples]).to(logits.device)
        return masks.mask_loss(self.config.loss, logits, targets)

    def activation_bytes(self) -> int:
        loss = costs.mask_loss_activations(self.config.loss, self.config.loss_size**2)
        return self.decoder.activation_bytes(self.grid) + loss

    def _target(self, sample: Any) -> Tensor:
        """(size, size) bool: the pixels of which at least half are covered."""
        mask = torch.from_numpy(np.ascontiguousarray(sample.mask())).float()
        return F.adaptive_avg_pool2d(mask[None, None], self.config.loss_size)[0, 0] >= 0.5

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        logits = self.logits(batch)
        found = masks.predict_masks(logits, [sample.size for sample in batch.samples])
        finite = logits.isfinite().flatten(1).all(1).tolist()
        return [
            Prediction(s.id, s.image, {"expression": s.expression}, mask, finite=numbers)
            for s, mask, numbers in zip(batch.samples, found, finite, strict=True)
        ]

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        metrics = masks.MaskMetrics()
        metrics.update((p.mask for p in predictions), (s.mask() for s in samples))
        return metrics.compute()
