"""From a ``data:`` section to lists of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mitrain.config import Section
from mitrain.data.records import read_records
from mitrain.data.refcoco import image_folder, read_refer, split_names
from mitrain.errors import ConfigError, DataError


class DataSection(Section):
    """What every kind of data has: where it is, and how much may be wrong with it.

    ``source`` names a prepared data set (mitrain data prepare); ``root`` is a folder of one's own. ``bad_samples`` is how
    many unreadable samples are skipped (and named) before a run stops. ``max_pixels`` bounds every image.
    """

    source: str | None = None
    root: str | None = None
    source_seed: int = 0
    bad_samples: int = Field(20, ge=0)
    max_pixels: int = Field(50_000_000, ge=1)

    @model_validator(mode="after")
    def _one_place(self) -> "DataSection":
        if (self.source is None) == (self.root is None):
            raise ValueError("give either data.source (a prepared data set) or data.root (a folder of your own)")
        return self


class RecordsConfig(DataSection, kind="data", name="records"):
    """Questions about pictures in JSONL or CSV files, one per split, with columns image, prompt, answer, candidates.

    ``columns`` maps those names to the file's own; ``kinds`` keeps only those kinds of question.
    """

    task: Literal["answer"] = "answer"
    splits: dict[str, str] = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    columns: dict[str, str] = {}
    kinds: tuple[str, ...] = ()

    def read(self, root: Path, split: str) -> list[Any]:
        if split not in self.splits:
            raise ConfigError(f"data.splits has no {split!r}: choose one of {', '.join(self.splits)}")
        samples = read_records(root / self.splits[split], self.columns or None)
        kept = [s for s in samples if not self.kinds or s.kind in self.kinds]
        if not kept:
            kinds = sorted({s.kind for s in samples})
            raise DataError(
                f"{root / self.splits[split]} holds no sample of kind {', '.join(self.kinds)}: it has {', '.join(kinds)}"
            )
        return kept

    def split_names(self, root: Path) -> list[str]:
        """The splits whose files are there."""
        return [split for split, name in self.splits.items() if (root / name).exists()] or list(self.splits)

    def image_root(self, root: Path) -> Path:
        return root


class RefcocoConfig(DataSection, kind="data", name="refcoco"):
    """Referring expressions in the files of RefCOCO, RefCOCO+, RefCOCOg or RefCLEF, and their images."""

    task: Literal["segment"] = "segment"
    dataset: str = "refcoco"
    split_by: str | None = None
    images: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        return read_refer(root, self.dataset, self.split_by, split, images=self.images)

    def split_names(self, root: Path) -> list[str]:
        """The splits that the references name."""
        return split_names(root, self.dataset, self.split_by)

    def image_root(self, root: Path) -> Path:
        return image_folder(root, self.dataset, self.images)


def limit(samples: Sequence[Any], count: int | None) -> list[Any]:
    """At most ``count`` samples, evenly spread over the list."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[i * len(samples) // count] for i in range(count)]
