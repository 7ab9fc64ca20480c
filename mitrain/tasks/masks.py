"""Losses, metrics and baselines for segmentation masks.

Every loss is a pair (sum, count), so that a mean over accumulated micro-batches and ranks is exact; every metric is a
vector of plain sums for the same reason. Two-class softmax depends on its logits only through their difference
s = l_1 - l_0, hence all losses work on one foreground score per pixel, whatever the number of classes.

Shape suffixes: B batch, C classes (1 or 2), h × w logit map. Masks of metrics are at each image's own size (H, W).
"""

import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mitrain.core.errors import ConfigError, DataError

CLASS_WEIGHTS = (0.9, 1.1)  # background, foreground: MiT's release
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # Lin et al., ICCV 2017
DICE_SMOOTH = 1e-5
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
LOSSES = ("ce", "bce", "focal", "dice", "ce+dice", "bce+dice", "focal+dice")

Mask = np.ndarray  # bool, (H, W)


def foreground_score(logits: Tensor) -> Tensor:
    """(B, C, h, w) logits → (B, h, w) log-odds of the foreground, in float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide[:, 0] if wide.shape[1] == 1 else wide[:, 1] - wide[:, 0]


def mask_loss(kind: str, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss ``kind`` as (sum, count); their quotient is the mean that is minimised.

    A pixel loss alone (ce, bce, focal) sums over pixels and counts their weights: ce's quotient is torch's weighted
    cross-entropy with weights 0.9 / 1.1. With dice, alone or added to a pixel loss, the unit is the sample: the sum of
    the samples' means, counted by B. ``logits`` (B, C, h, w), ``target`` (B, h, w) bool or in [0, 1].
    """
    if kind not in LOSSES:
        raise ConfigError(f"loss {kind!r} is not known: choose one of {', '.join(LOSSES)}")
    score = foreground_score(logits)
    target = target.to(score)
    if kind == "dice":
        return per_sample(dice_loss(score, target))
    values, weights = PIXEL_LOSSES[kind.removesuffix("+dice")](score, target)
    if not kind.endswith("+dice"):
        return values.sum(), weights.sum().detach()
    return per_sample(values.sum((1, 2)) / weights.sum((1, 2)) + dice_loss(score, target))


def per_sample(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.sum(), torch.tensor(len(values), dtype=values.dtype, device=values.device)


def weighted_cross_entropy(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted pixel values and weights, both (B, h, w): class weights 0.9 and 1.1."""
    background, foreground = CLASS_WEIGHTS
    weights = background + (foreground - background) * target
    return F.binary_cross_entropy_with_logits(score, target, weights, reduction="none"), weights


def binary_cross_entropy(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.binary_cross_entropy_with_logits(score, target, reduction="none"), torch.ones_like(score)


def focal_loss(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-α_t (1 - p_t)^γ log p_t with α = 0.25, γ = 2 (Lin et al., ICCV 2017, Eq. 5); every pixel counts one."""
    entropy = F.binary_cross_entropy_with_logits(score, target, reduction="none")
    chance = torch.sigmoid(score)
    wrong = chance + target - 2 * chance * target
    alpha = 1 - FOCAL_ALPHA + (2 * FOCAL_ALPHA - 1) * target
    return alpha * wrong**FOCAL_GAMMA * entropy, torch.ones_like(score)


def dice_loss(score: Tensor, target: Tensor) -> Tensor:
    """(B,) values 1 - (2 Σ p y + ε) / (Σ p² + Σ y² + ε), p = σ(score): squared denominators as in MiT's release."""
    chance = torch.sigmoid(score)
    overlap = (chance * target).sum((1, 2))
    total = chance.square().sum((1, 2)) + target.square().sum((1, 2))
    return 1 - (2 * overlap + DICE_SMOOTH) / (total + DICE_SMOOTH)


PIXEL_LOSSES = {"ce": weighted_cross_entropy, "bce": binary_cross_entropy, "focal": focal_loss}


def predict_masks(logits: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Mask]:
    """Masks at every image's own size (H, W): scores resized bilinearly (aligned corners), foreground where above 0."""
    scores = foreground_score(logits.detach())
    masks = []
    for score, size in zip(scores, sizes, strict=True):
        resized = F.interpolate(score[None, None], size=tuple(size), mode="bilinear", align_corners=True)
        masks.append((resized[0, 0] > 0).cpu().numpy())
    return masks


class MaskMetrics:
    """oIoU, mIoU, mean Dice and precision@IoU over a set of masks, accumulated in `sums`.

    `sums` is a float64 vector [samples, ΣI, ΣU, Σ IoU, Σ Dice, hits at 0.5 … 0.9] that may be added over batches and
    all-reduced over ranks; pixel counts stay exact up to 2⁵³. With I and U the intersection and union of a sample:
    oIoU = ΣI / ΣU, IoU = I / U (0 where both masks are empty, as published), Dice = 2 IoU / (1 + IoU), and a sample is
    a hit at t when IoU ≥ t.
    """

    def __init__(self, sums: Tensor | None = None):
        self.sums = torch.zeros(5 + len(THRESHOLDS), dtype=torch.float64) if sums is None else sums

    def update(self, predicted: Iterable[Mask], target: Iterable[Mask]) -> None:
        """Add samples: pairs of bool masks of equal shape; shapes may differ between samples."""
        for mine, true in zip(predicted, target, strict=True):
            self.sums += torch.tensor(sample_sums(mine, true), dtype=torch.float64)

    def __add__(self, other: "MaskMetrics") -> "MaskMetrics":
        return MaskMetrics(self.sums + other.sums)

    def compute(self) -> dict[str, object]:
        """{"samples", "oiou", "miou", "dice", "precision": {"0.5": …}}, fractions of 1; 0 where nothing was counted."""
        samples, intersection, union, iou, dice, *hits = self.sums.tolist()
        count = max(samples, 1)
        return {
            "samples": int(samples),
            "oiou": intersection / union if union else 0.0,
            "miou": iou / count,
            "dice": dice / count,
            "precision": {str(t): hit / count for t, hit in zip(THRESHOLDS, hits, strict=True)},
        }


def sample_sums(predicted: Mask, target: Mask) -> list[float]:
    predicted, target = np.asarray(predicted, dtype=bool), np.asarray(target, dtype=bool)
    if predicted.shape != target.shape:
        raise DataError(f"a mask of {predicted.shape} is compared with one of {target.shape}: use the image's own size")
    intersection = int(np.count_nonzero(predicted & target))
    union = int(np.count_nonzero(predicted | target))
    iou = intersection / union if union else 0.0
    return [1, intersection, union, iou, 2 * iou / (1 + iou), *(iou >= t for t in THRESHOLDS)]


def baseline_masks(instances: Sequence[Mask], seed: int, key: str) -> dict[str, Mask]:
    """What a model without language could do at best: masks chosen from a scene's true instance masks.

    The "union" of all objects; the "largest" by pixels, and the "central", whose centroid is nearest the image's centre
    (the first object wins a tie); and a "random" one, by ``seed`` and ``key``, the sample's id.
    """
    if not len(instances):
        raise DataError(f"the scene of {key!r} has no instance masks: baselines need its annotations")
    largest = max(range(len(instances)), key=lambda i: np.count_nonzero(instances[i]))
    central = min(range(len(instances)), key=lambda i: distance_to_centre(instances[i]))
    chosen = random.Random(f"{seed}:{key}").randrange(len(instances))
    return {
        "union": np.logical_or.reduce(instances),
        "largest": instances[largest],
        "central": instances[central],
        "random": instances[chosen],
    }


def distance_to_centre(mask: Mask) -> float:
    """Pixels from the mask's centroid to the image's centre; infinite for an empty mask."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return float("inf")
    height, width = mask.shape
    return float(np.hypot(rows.mean() - (height - 1) / 2, columns.mean() - (width - 1) / 2))
