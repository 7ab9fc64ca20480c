"""Segmenting what an expression refers to: the language model reads the text, a small decoder the image's patches.

The (infused) text state conditions the decoder (MiT §3; its release calls this the referring-segmentation head).

Shapes: B samples, T tokens, D hidden width, N patches, c channels, h × w the decoder's output, H × W an image's own size.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, DataError
from mitrain.core.user_code import FunctionName
from mitrain.data.expressions import ExpressionsConfig, RefcocoConfig
from mitrain.data.figures import Panel, outlined, overlay
from mitrain.data.formats.refcoco import ReferSample
from mitrain.models.batch import ModalityInputs
from mitrain.tasks import decoders, masks
from mitrain.tasks.base import Answer, Batch, Given, Parts, Prediction, Question, Splits, Task
from mitrain.tasks.readout import See, read_out, runs_text, statistics, width_of
from mitrain.tasks.template import frame_of, template_with

EXAMPLES = 5  # broken masks that `describe` names
AREAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # edges of its histogram, as shares of the picture


class SegmentConfig(Section, kind="task", name="segment"):
    """Published are the last token's state in ``readout``, the decoders film and unet, and ``film: first``; a modality's
    vector in ``readout``, by its name, is late fusion."""

    template: template_with("expression") = "{expression}"
    readout: tuple[str, ...] = ("last",)
    dropout: float = Field(0.0, ge=0, lt=1)
    decoder: Literal["film", "unet", "ground"] = "film"
    dim: int = Field(64, ge=4, le=1 << 16)
    heads: int = Field(4, ge=1, le=1 << 10)
    ffn: int = Field(2048, ge=4, le=1 << 18)
    film: Literal["first", "every"] = "first"
    coords: bool = False
    metric: FunctionName | None = None
    loss: Literal["ce", "bce", "focal", "dice", "ce+dice", "bce+dice", "focal+dice"] = "ce"
    unet_width: int = Field(512, ge=1, le=1 << 16)
    loss_size: int = Field(56, ge=8, le=1024)


class SegmentTask(Task):
    """mask = decoder(patch tokens of several encoder levels; condition = standardised read-outs of the text)."""

    settings = SegmentConfig
    formats = (RefcocoConfig, ExpressionsConfig)
    metric = "oiou"
    decodes = True
    texts_apart = asks = "expression"
    shuffles = "expressions"
    columns = (("oIoU", "oiou"), ("mIoU", "miou"), ("P@0.5", "precision@0.5"))
    controls = ("shuffle", "other-inputs")

    def __init__(
        self,
        config: SegmentConfig,
        parts: Parts,
        level_widths: Sequence[int],
        grid: int,
        patch: int,
        prefix: int,
        widths: Mapping[str, int] = MappingProxyType({}),
    ):
        super().__init__(parts)
        if not level_widths:
            raise ConfigError(
                "the task 'segment' reads patch tokens: give an encoder of model.encoders levels, as levels=[10,7,4]"
            )
        if not config.readout:
            raise ConfigError("task.readout is empty: give last, mean or embeddings")
        self.config, self.grid, self.widths = config, (grid, grid), widths
        self.classes = 2 if config.loss.startswith("ce") else 1
        width = sum(width_of(parts, name, widths) for name in config.readout)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        shape = {"level_widths": level_widths, "condition_width": width, "classes": self.classes, "prefix_tokens": prefix}
        if config.decoder == "unet":
            self.decoder: nn.Module = decoders.UnetDecoder(width=config.unet_width, **shape)
        elif config.decoder == "ground":
            chosen = config.model_dump(include={"dim", "heads", "ffn"})
            self.decoder = decoders.GroundDecoder(patch=patch, **chosen, **shape)
        else:
            chosen = config.model_dump(include={"dim", "heads", "ffn", "film", "coords"})
            self.decoder = decoders.FilmDecoder(patch=patch, **chosen, **shape)
        frame = frame_of(config.template)
        self._ids = cache(lambda text: parts.text.tokens(text, frame=frame))

    @classmethod
    def build(cls, config: SegmentConfig, given: Given) -> "SegmentTask":
        seeing = [encoder for encoder in given.encoders if encoder.config.levels]
        if len({(e.grid, e.prefix_tokens) for e in seeing}) > 1:
            raise ConfigError(
                "the encoders with levels have different patch grids: give levels to one of them, or equal sizes"
            )
        widths = [encoder.level_width for encoder in seeing for _ in encoder.config.levels]
        shape = (seeing[0].grid, seeing[0].patch, seeing[0].prefix_tokens) if seeing else (1, 1, 0)
        return cls(config, given.parts, widths, *shape, given.widths)

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        if not runs_text(self.config.readout):
            return []
        return [self._ids(expression) for expression in sorted({s.expression for s in samples})]

    def tokens(self, samples: Sequence[Any]) -> int:
        return sum(len(self._ids(s.expression)) for s in samples)

    def condition(self, expressions: Sequence[str], inputs: ModalityInputs | None) -> Tensor:
        """(B, widths of the read-outs): what the text says, standardised per dimension."""
        rows = [self._ids(expression) for expression in expressions]
        parts = read_out(self.parts, rows, self.config.readout, inputs)
        return (torch.cat([parts[name] for name in self.config.readout], -1) - self.mean) * self.scale

    @torch.no_grad()
    def fit(self, samples: Sequence[Any], see: See | None = None) -> None:
        """Mean and standard deviation of the read-outs over the training expressions, and of those that need files over
        the samples."""
        rows = [self._ids(expression) for expression in sorted({s.expression for s in samples})[:2048]]
        own = lambda sample: self._ids(sample.expression)  # noqa: E731
        mean, scale = statistics(self.parts, self.config.readout, self.widths, rows, samples, see, own)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def _given(self, batch: Batch) -> tuple[list[Tensor], Tensor, tuple[int, int]]:
        condition = self.condition([s.expression for s in batch.samples], batch.inputs)
        return batch.levels, F.dropout(condition, self.config.dropout, self.training), self.grid

    def logits(self, batch: Batch) -> Tensor:
        """(B, classes, h, w)."""
        return self.decoder(*self._given(batch))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The masks' loss and, where the decoder grounds the text, that of the grounding, of equal weight."""
        size = self.config.loss_size
        grounds = self.config.decoder == "ground"
        logits, meant = self.decoder.grounded(*self._given(batch)) if grounds else (self.logits(batch), None)
        logits = decoders.resize(logits, (size, size))
        targets = torch.stack([self._target(s) for s in batch.samples]).to(logits.device)
        total, count = masks.mask_loss(self.config.loss, logits, targets)
        return total + (count * decoders.grounding_loss(meant, targets).mean() if grounds else 0), count

    def _target(self, sample: Any) -> Tensor:
        """(size, size) bool: the pixels of which at least half are covered."""
        mask = torch.from_numpy(np.ascontiguousarray(sample.mask())).float()
        return F.adaptive_avg_pool2d(mask[None, None], self.config.loss_size)[0, 0] >= 0.5

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        logits = self.logits(batch)
        predicted = masks.predict_masks(logits, [sample.size for sample in batch.samples])
        finite = logits.isfinite().flatten(1).all(1).tolist()
        return [
            Prediction(s.id, s.inputs, {"expression": s.expression}, mask, finite=numbers)
            for s, mask, numbers in zip(batch.samples, predicted, finite, strict=True)
        ]

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        metrics, kinds = masks.MaskMetrics(), defaultdict(masks.MaskMetrics)
        truths = [s.mask() for s in samples]
        metrics.update((p.mask for p in predictions), truths)
        for prediction, truth in zip(predictions, truths, strict=True):
            prediction.values["iou"] = iou_of(prediction.mask, truth)
        for sample, prediction, truth in zip(samples, predictions, truths, strict=True):
            kinds[sample.kind].update([prediction.mask], [truth])
        several = {f"oiou/{kind}": own.compute()["oiou"] for kind, own in sorted(kinds.items())}
        return metrics.compute() | (several if len(several) > 1 else {})

    def baselines(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """What masks chosen without language reach, given the true masks of all objects that the split names."""
        scenes: dict[str, dict[bytes, np.ndarray]] = defaultdict(dict)
        for s in splits.complete():
            mask = s.mask()
            scenes[s.inputs["image"]][mask.tobytes()] = mask
        names = {
            "union": "all objects",
            "largest": "largest object",
            "central": "most central object",
            "random": "random object",
        }
        metrics = {kind: masks.MaskMetrics() for kind in names}
        for s in splits.chosen:
            for kind, mask in masks.baseline_masks(list(scenes[s.inputs["image"]].values()), splits.seed, s.id).items():
                metrics[kind].update([mask], [s.mask()])
        return {f"{names[kind]} (true masks)": metric.compute() for kind, metric in metrics.items()}

    def asked(self, question: Question) -> ReferSample:
        picture = question.decoded("image")
        return ReferSample(question.id, question.inputs, question.text, (picture.height, picture.width))

    def told(self, question: Question, prediction: Prediction) -> Answer:
        """The mask of what the text refers to, and which share of the picture it is."""
        text, mask = question.text, prediction.mask
        share = float(mask.mean())
        values = {**question.files, "expression": text, "mask_share": share}
        return Answer(values, [f"{text!r}: {int(mask.sum())} of {mask.size} pixels ({100 * share:.1f} %)"], mask)

    def panel(self, sample: Any, prediction: Prediction, shown: Image.Image) -> Panel:
        truth = sample.mask()
        iou = iou_of(prediction.mask, truth)
        drawn = outlined(overlay(shown, prediction.mask), truth)
        return Panel(drawn, [sample.expression, f"IoU {iou:.2f}"], iou >= 0.5)

    @staticmethod
    def describe(samples: Sequence[ReferSample]) -> dict[str, Any]:
        areas, broken = [], {}
        for sample in samples:
            try:
                areas.append(float(sample.mask().mean()))
            except DataError as error:
                broken[sample.id] = str(error)
        edges = [0.0, *AREAS, 1.0]
        places = np.digitize(areas, AREAS, right=True)
        return {
            "expressions": len({sample.expression for sample in samples}),
            "kinds": dict(Counter(sample.kind for sample in samples if sample.kind)),
            "broken_masks": len(broken),
            "broken_mask_examples": dict(list(broken.items())[:EXAMPLES]),
            "empty_masks": areas.count(0.0),
            "mean_area": round(float(np.mean(areas)), 4) if areas else None,
            "areas": {
                f"{100 * low:g}-{100 * high:g} %": int((places == place).sum())
                for place, (low, high) in enumerate(pairwise(edges))
            },
        }

    @staticmethod
    def caption(sample: ReferSample) -> str:
        return sample.expression

    @staticmethod
    def caution(samples: Sequence[ReferSample], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
        masks = [sample.mask() for sample in samples if not sample.fault()]
        empty, full = sum(not mask.any() for mask in masks), sum(bool(mask.all()) for mask in masks)
        if empty == len(masks):
            raise DataError(f"{split}: no mask has an object in it, so that every IoU is 0: give annotations with objects")
        lines = [f"{split}: {empty} of {len(masks)} masks are empty; their IoU is 0 whatever is found"] if empty else []
        if full == len(masks):
            lines.append(f"{split}: every mask covers its whole picture, so that marking all is right every time")
        return lines


def iou_of(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union; 0 of two empty masks."""
    union = np.count_nonzero(truth | mask)
    return np.count_nonzero(truth & mask) / union if union else 0.0
