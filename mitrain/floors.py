"""Floors: what is reached on a split without the model, from the same samples and features.

A score says something only beside them: what always giving the commonest answer scores, what a linear probe makes of the
infused features, what a mask chosen without reading the expression covers.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mitrain import dist
from mitrain.data.sources import portion
from mitrain.features import ImageFeatures
from mitrain.fingerprint import digests_of, require_same
from mitrain.model import resolve_data
from mitrain.probe import RIDGES, probe_accuracy, probe_labels, ridge_fit
from mitrain.runs import Run
from mitrain.tasks import masks
from mitrain.tasks.label_metrics import label_metrics
from mitrain.tasks.ranks import Gallery, both_ways, chance, rank_metrics


def floors_of(run: Run, split: str, chosen: list[Any], images: ImageFeatures) -> dict[str, dict[str, Any]]:
    """Metrics of each floor by its name, on the samples ``chosen`` from a split."""
    return FLOORS[run.config.task.section_name](run, split, chosen, images)


def learned_from(run: Run, images: ImageFeatures) -> tuple[list[Any], list[Any]]:
    """The samples that the run was trained on (``train.fraction`` of the split) and those of val, with features at hand."""
    data, root = run.config.data, resolve_data(run.config.data)
    train, val = portion(data.read(root, "train"), run.config.train.fraction), data.read(root, "val")
    readable = images.readable(train), images.readable(val)
    compare_ranks({"train": readable[0], "val": readable[1]}, images)
    images.prepare(sorted({s.image for part in readable for s in part}), 1)
    return readable


def compare_ranks(splits: Mapping[str, Sequence[Any]], images: ImageFeatures) -> None:
    """RankError where ranks, of which each reads what a floor is made of, read different samples or pictures."""
    if dist.world() > 1:
        require_same(digests_of(splits, images.key))


def answer_floors(run: Run, _split: str, chosen: list[Any], images: ImageFeatures) -> dict[str, dict[str, Any]]:
    """The majority answer, and a linear probe on the features that are infused."""
    train, val = learned_from(run, images)
    found = probe_accuracy(lambda part: run.model.norm(images.pooled([s.image for s in part])), train, val, chosen)
    answers = [s.answer for s in chosen]
    most = max(answers.count(a) for a in set(answers)) / len(answers)
    return {"majority answer": {"accuracy": most, "samples": len(chosen)}, "linear probe on the same features": found}


def label_floors(run: Run, _split: str, chosen: list[Any], images: ImageFeatures) -> dict[str, dict[str, Any]]:
    """The training split's commonest label, and a linear probe on the features that are infused."""
    (train, val), task = learned_from(run, images), run.model.task
    truths = [task.targets(part).cpu().numpy() > 0 for part in (train, val, chosen)]
    features = [run.model.norm(images.pooled([s.image for s in part])).numpy() for part in (train, val, chosen)]
    shares = truths[0].mean(0)
    commonest = np.tile(np.eye(len(shares))[shares.argmax()], (len(chosen), 1))
    found = {
        "majority label": commonest,
        "linear probe on the same features": probe_labels(features, truths[:2], task.multilabel),
    }
    if task.multilabel:
        found["training shares"] = np.tile(shares, (len(chosen), 1))
    return {n: label_metrics(truths[2], c, task.multilabel, task.config.threshold) for n, c in found.items()}


def rank_floors(run: Run, _split: str, chosen: list[Any], images: ImageFeatures) -> dict[str, dict[str, Any]]:
    """A random order, and a ridge regression from the infused features to the frozen language model's text states."""
    parts, task = [*learned_from(run, images), chosen], run.model.task
    features = [run.model.norm(images.pooled([s.image for s in part])).numpy() for part in parts]
    states = [task.frozen_states([s.text for s in part]) for part in parts]
    galleries = [Gallery([s.image for s in part], [s.text for s in part]) for part in parts]
    counts = {"samples": len(chosen), "images": len(galleries[2].images)}
    found = {
        "random order": chance(galleries[2]),
        "ridge regression to the text states": ridge(features, states, galleries),
    }
    return {name: values | counts for name, values in found.items()}


def ridge(features: Sequence[Any], states: Sequence[Any], galleries: Sequence[Gallery]) -> dict[str, Any]:
    """Retrieval metrics of the last part, of the regression that is best on the second.

    Args:
        features, states: of the training, validation and asked samples, (n, e) and (n, D).
    """
    best = None
    for strength in RIDGES:
        predict = ridge_fit(features[0], states[0], strength)
        val, found = (
            rank_metrics(*both_ways(gallery, unit(predict(x[gallery.first])), unit(y)), gallery.decided())
            for x, y, gallery in zip(features[1:], states[1:], galleries[1:], strict=True)
        )
        if best is None or val["recall_mean"] > best[0]:
            best = (val["recall_mean"], found)
    return best[1]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


def mask_floors(run: Run, split: str, chosen: list[Any], images: ImageFeatures) -> dict[str, dict[str, Any]]:
    """What masks chosen without language reach, given the true masks of all objects that the split names."""
    scenes: dict[str, dict[bytes, np.ndarray]] = defaultdict(dict)
    shown = {s.image for s in chosen}
    there = run.config.data.read(resolve_data(run.config.data), split)
    objects = [s for s in there if s.image in shown and not s.fault()]
    compare_ranks({split: objects}, images)
    for s in objects:
        mask = s.mask()
        scenes[s.image][mask.tobytes()] = mask
    metrics = {kind: masks.MaskMetrics() for kind in ("union", "largest", "central", "random")}
    for s in chosen:
        for kind, mask in masks.floor_masks(list(scenes[s.image].values()), run.config.seed, s.id).items():
            metrics[kind].update([mask], [s.mask()])
    names = {
        "union": "all objects",
        "largest": "largest object",
        "central": "most central object",
        "random": "random object",
    }
    return {f"{names[kind]} (true masks)": m.compute() for kind, m in metrics.items()}


FLOORS = {"answer": answer_floors, "classify": label_floors, "retrieve": rank_floors, "segment": mask_floors}
