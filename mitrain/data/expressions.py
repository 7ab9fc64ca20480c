"""The sections ``data`` of referring expressions: in RefCOCO's files, and of one's own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data import splitting
from mitrain.data.formats.expressions import read_expressions
from mitrain.data.formats.manifest import Manifest
from mitrain.data.formats.refcoco import image_folder, read_objects, read_refer, split_names
from mitrain.data.sources import DataSection, DrawnSection, split_file


class RefcocoConfig(DataSection, kind="data", name="refcoco"):
    """Referring expressions in the files of RefCOCO, RefCOCO+, RefCOCOg or RefCLEF, and their images. ``inputs``: image, and
    reference where the references name a second picture."""

    takes_inputs = True

    dataset: str = "refcoco"
    split_by: str | None = None
    images: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        samples = read_refer(root, self.dataset, self.split_by, split, images=self.images)
        return with_inputs(samples, self.inputs, self.may_lack, f"the split {split!r} of {self.dataset}")

    def objects(self, root: Path, split: str) -> list[Any]:
        """Every object of the split's pictures as a sample, whether or not an expression means it."""
        return read_objects(root, self.dataset, self.split_by, split)

    def split_names(self, root: Path) -> list[str]:
        return split_names(root, self.dataset, self.split_by)

    def file_root(self, root: Path) -> Path:
        return image_folder(root, self.dataset, self.images)


class ExpressionsConfig(DrawnSection, kind="data", name="expressions"):
    """Referring expressions of one's own in COCO's JSON (`mitrain.data.formats.expressions`)."""

    takes_inputs = True

    splits: dict[str, str] = {"train": "train.json", "val": "val.json", "test": "test.json"}
    expression: str | None = None
    images: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        name = "train" if self.is_drawn(split) else split
        source = Manifest(root, split_file(self.splits, name, also=self.shares))
        samples = read_expressions(source, self.expression, self.images)
        samples = with_inputs(samples, self.inputs, self.may_lack, str(source))
        if not self.is_drawn(split):
            return samples
        apart = [replace(sample, object="") for sample in samples]  # two things of a name may be in two splits
        kept = {sample.id for sample in splitting.drawn(apart, self.shares, self.source_seed, source)[split]}
        return [sample for sample in samples if sample.id in kept]

    def split_names(self, root: Path) -> list[str]:
        own = [split for split, name in self.splits.items() if (root / name).exists()]
        return [*(own or self.splits), *self.shares]


def with_inputs(samples: list[Any], names: Sequence[str], may_lack: Sequence[str], where: str) -> list[Any]:
    """The samples with those of their files that ``names`` lists; DataError where one lacks one that it may not."""
    for sample in samples:
        if absent := [name for name in names if name not in sample.inputs and name not in may_lack]:
            raise DataError(
                f"{where}: {sample.id[:80]!r} has no {absent[0]!r}, which an encoder reads: give its file there, or list"
                f" {absent[0]} in data.may_lack"
            )
    return [replace(s, inputs={name: file for name, file in s.inputs.items() if name in names}) for s in samples]
