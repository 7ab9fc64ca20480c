"""The section ``data`` of referring expressions of one's own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mitrain.data import splitting
from mitrain.data.formats.expressions import read_expressions
from mitrain.data.formats.manifest import Manifest
from mitrain.data.sources import DrawnSection, split_file


class ExpressionsConfig(DrawnSection, kind="data", name="expressions"):
    """Referring expressions of one's own in COCO's JSON (`mitrain.data.formats.expressions`). ``expression``: the key of an
    annotation that has them, where it is none of the usual ones; ``images``: the pictures' folder."""

    splits: dict[str, str] = {"train": "train.json", "val": "val.json", "test": "test.json"}
    expression: str | None = None
    images: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        name = "train" if self.is_drawn(split) else split
        source = Manifest(root, split_file(self.splits, name, also=self.shares))
        samples = read_expressions(source, self.expression, self.images)
        if not self.is_drawn(split):
            return samples
        apart = [replace(sample, object="") for sample in samples]  # two things of a name may be in two splits
        kept = {sample.id for sample in splitting.drawn(apart, self.shares, self.source_seed, source)[split]}
        return [sample for sample in samples if sample.id in kept]

    def split_names(self, root: Path) -> list[str]:
        """The splits whose files are there, and those that are drawn."""
        own = [split for split, name in self.splits.items() if (root / name).exists()]
        return [*(own or self.splits), *self.shares]
