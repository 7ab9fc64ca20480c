"""Baselines of a run: what is reached on a split without the trained model, from the same samples and features."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mitrain.core import dist
from mitrain.data.features import Features
from mitrain.data.sources import portion
from mitrain.tasks.base import Splits
from mitrain.training.build import resolve_data
from mitrain.training.fingerprint import digests_of, require_same
from mitrain.training.runs import Run


def baselines_of(run: Run, split: str, chosen: list[Any], files: Features) -> dict[str, dict[str, Any]]:
    """Metrics of each of the task's baselines by its name, on the samples ``chosen`` from a split."""
    data, root = run.config.data, resolve_data(run.config.data)

    def learn() -> tuple[list[Any], list[Any]]:
        """What the run was trained on (``train.fraction`` of the split), and val."""
        train, val = portion(data.read(root, "train"), run.config.train.fraction), data.read(root, "val")
        readable = files.readable(train, 1), files.readable(val, 1)
        compare_ranks({"train": readable[0], "val": readable[1]}, files)
        return readable

    def features(samples: Sequence[Any]) -> Tensor:
        found = run.model.normalised(samples, files)
        return found if found.shape[1] else found.new_zeros(len(found), 1)  # of texts alone: nothing tells them apart

    def complete() -> list[Any]:
        """All of the split that can be scored on the files chosen; of data that knows its pictures' objects, these."""
        shown = {s.inputs.get("image", s.files) for s in chosen}
        every = data.objects(root, split) if hasattr(data, "objects") else data.read(root, split)
        there = [s for s in every if s.inputs.get("image", s.files) in shown and not s.fault()]
        compare_ranks({split: there}, files)
        return there

    splits = Splits(chosen, learn, complete, features, run.config.seed)
    return run.model.task.baselines(splits)


def compare_ranks(splits: Mapping[str, Sequence[Any]], files: Features) -> None:
    """RankError where ranks, of which each reads what a baseline is made of, read different samples or files."""
    if dist.world() > 1:
        require_same(digests_of(splits, files.contents))
