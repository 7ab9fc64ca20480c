"""From a ``data:`` section to lists of samples."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, DataError
from mitrain.data import splitting
from mitrain.data.columns import column, take
from mitrain.data.formats import captions, labels, targets
from mitrain.data.formats.conversations import read_conversations
from mitrain.data.formats.folders import read_folders
from mitrain.data.formats.manifest import Manifest
from mitrain.data.formats.records import read_records
from mitrain.data.formats.rows import MISSING
from mitrain.data.streaming import Stream, StreamLoader
from mitrain.models.encoders.config import check_name

log = logging.getLogger(__name__)


class DataSection(Section):
    """What every kind of data has: where it is, and how much may be wrong with it."""

    source: str | None = None
    root: str | None = None
    source_seed: int = 0
    bad_samples: int = Field(20, ge=0)
    bad_share: float = Field(0.1, ge=0, le=1)
    max_pixels: int = Field(50_000_000, ge=1)
    inputs: tuple[str, ...] = ("image",)
    may_lack: tuple[str, ...] = ()

    takes_inputs: ClassVar[bool] = False
    """Whether its files are tables whose columns may name any inputs; without, they name one picture each."""
    buffer: ClassVar[int | None] = None
    """How many training samples are in memory at a time; None: all."""

    def with_class_names(self, root: Callable[[], Path]) -> Self:
        """The section with what follows from the data in the folder ``root()`` written out."""
        return self

    def known(self, root: Path, split: str) -> Sequence[str]:
        """What the samples of a split may be labelled with; empty: anything."""
        return ()

    def file_root(self, root: Path) -> Path:
        return root

    @model_validator(mode="after")
    def _known_inputs(self) -> "DataSection":
        if not self.takes_inputs and (self.inputs != ("image",) or self.may_lack):
            raise ValueError(f"the files of {self.section_name!r} have one picture a sample: leave out inputs and may_lack")
        for name in self.inputs:
            check_name(name, "inputs")
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"inputs={list(self.inputs)} names one twice")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> "DataSection":
        if (self.source is None) == (self.root is None):
            raise ValueError("give either data.source (a prepared data set) or data.root (a folder of your own)")
        return self


class DrawnSection(DataSection):
    """Data in files or folders for each split, named by ``splits``. What shares an object, a file or nearly its picture
    stays together where val or test are drawn."""

    splits: dict[str, str]
    val_share: float = Field(0.0, ge=0, lt=1)
    test_share: float = Field(0.0, ge=0, lt=1)

    @property
    def shares(self) -> dict[str, float]:
        """The splits that are drawn from training's, with their shares of it."""
        return {split: share for split, share in (("val", self.val_share), ("test", self.test_share)) if share}

    def is_drawn(self, split: str) -> bool:
        """Whether the split, of training's samples, is what a draw decides."""
        return bool(self.shares) and (split == "train" or split in self.shares)

    @model_validator(mode="after")
    def _drawn_or_given(self) -> Self:
        for split in self.shares:
            if split in self.splits:
                raise ValueError(f"{split}_share draws a split that has a file: leave {split!r} out of splits={self.splits}")
        if self.shares and ("train" not in self.splits or sum(self.shares.values()) >= 1):
            raise ValueError("val_share and test_share are parts of splits.train: give its file, and less than all of it")
        return self


class TableSection(DrawnSection):
    """Samples in tables. The first ``stream`` records stand for all where statistics of training are asked for."""

    takes_inputs = True

    splits: dict[str, str] = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}
    columns: dict[str, str] = {}
    stream: int | None = Field(None, ge=1)

    @property
    def buffer(self) -> int | None:
        return self.stream

    @model_validator(mode="after")
    def _streamed_in_parts(self) -> Self:
        if self.stream and (self.shares or not getattr(self, "classes", True)):
            need = "draws val_share and test_share from" if self.shares else "takes its classes from"
            mend = "give files for val and test" if self.shares else "name all classes in data.classes"
            raise ValueError(f"a stream is not read as a whole, which {need} the training split: {mend}")
        return self

    def read(self, root: Path, split: str) -> list[Any]:
        """The samples of a split. DataError with file and line, ConfigError for a split that there is not."""
        if not self.is_drawn(split):
            source = Manifest(root, split_file(self.splits, split, also=self.shares))
            if self.stream and split == "train":
                source = Stream(source, source.files(), self.stream, checks=True)
            samples = self.read_file(source, self.known(root, split))
            if isinstance(source, Stream) and source.at is not None:
                log.warning("%s is streamed: its first %d records stand for it in statistics", source, self.stream)
            return samples
        source = Manifest(root, self.splits["train"])
        samples = self.read_file(source, self.known(root, "train"))
        return splitting.drawn(samples, self.shares, self.source_seed, source)[split]

    def stream_of(self, root: Path, usable: Callable[[list[Any]], list[Any]], batch: int, seed: int) -> StreamLoader:
        """The training samples, ``stream`` records at a time."""
        read = lambda source: self.read_file(source, self.known(root, "train"))  # noqa: E731
        return StreamLoader(Manifest(root, split_file(self.splits, "train")), self.stream, read, usable, batch, seed)

    def read_file(self, source: Manifest, known: Sequence[str]) -> list[Any]:
        """The samples of ``source``."""
        raise NotImplementedError

    def split_names(self, root: Path) -> list[str]:
        """The splits whose files are there, and those that are drawn."""
        sources = {split: Manifest(root, name) for split, name in self.splits.items()}
        return ([split for split, one in sources.items() if one.is_there()] or list(self.splits)) + list(self.shares)


class RecordsConfig(TableSection, kind="data", name="records"):
    """Questions about files in tables with columns image, prompt, answer, candidates. No prompt, and no answer but among
    candidates, is one of the words ``missing``."""

    kinds: tuple[str, ...] = ()
    missing: tuple[str, ...] = MISSING

    def read_file(self, source: Manifest, known: Sequence[str]) -> list[Any]:
        samples = read_records(source, self.columns, self.missing, self.inputs, self.may_lack)
        return of_kinds(samples, self.kinds, str(source), source.checks_columns)


class ConversationsConfig(TableSection, kind="data", name="conversations"):
    """Conversations about files: LLaVA's, ShareGPT's and chat APIs' JSON (`mitrain.data.formats.conversations`)."""

    @model_validator(mode="after")
    def _no_columns(self) -> Self:
        if self.columns:
            raise ValueError("conversations have the keys of LLaVA or of chat APIs: leave out columns")
        return self

    def read_file(self, source: Manifest, known: Sequence[str]) -> list[Any]:
        return read_conversations(source, self.inputs, self.may_lack)


class ClassSection(DataSection):
    """Data of a classification. ``classes`` are all labels there are, in the head's order; left out, they are those of the
    training split. ``multilabel``: whether samples have several."""

    classes: tuple[str, ...] = ()
    multilabel: bool = False

    def with_class_names(self, root: Callable[[], Path]) -> Self:
        return self if self.classes else self.model_copy(update={"classes": self.class_names(root())})

    def known(self, root: Path, split: str) -> Sequence[str]:
        return self.classes if self.classes or split == "train" else self.class_names(root)

    def class_names(self, root: Path) -> tuple[str, ...]:
        """``classes``, or the labels of the training split in alphabetical order."""
        return self.classes or labels.class_names(self.read(root, "train"), f"the training split in {str(root)!r}")


class LabelledConfig(TableSection, ClassSection, kind="data", name="labelled"):
    """Labelled files and texts in tables with columns image, text, label. A label is one of the words ``missing`` only
    where ``classes`` names it."""

    separator: str = Field("|", min_length=1)
    missing: tuple[str, ...] = MISSING

    def read_file(self, source: Manifest, known: Sequence[str]) -> list[Any]:
        words = (self.multilabel, self.separator, known, self.missing)
        return labels.read_labels(source, self.columns, *words, self.inputs, self.may_lack)


class FoldersConfig(DrawnSection, ClassSection, kind="data", name="folders"):
    """Files in a folder for each class below ``root/SPLIT``; ``splits`` says what the splits' folders are called, as
    {train: .} where there are none."""

    takes_inputs = True

    splits: dict[str, str] = {"train": "train", "val": "val", "test": "test"}

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if len(self.inputs) != 1 or self.may_lack or self.multilabel:
            raise ValueError("folders of classes hold one file and one label a sample: give one encoder and no may_lack")
        return self

    def read(self, root: Path, split: str) -> list[Any]:
        """The samples of a split."""
        if self.is_drawn(split):
            samples = read_folders(root, self.splits["train"], self.inputs[0], self.classes)
            source = Manifest(root, self.splits["train"])
            return splitting.drawn(samples, self.shares, self.source_seed, source, files=())[split]
        folder = split_file(self.splits, split, also=self.shares)
        return read_folders(root, folder, self.inputs[0], self.known(root, split))

    def split_names(self, root: Path) -> list[str]:
        """The splits whose folders are there, and those that are drawn."""
        return there(self.splits, root) + list(self.shares)


class TargetSection(DataSection):
    """Data of a regression."""


class RatedConfig(TableSection, TargetSection, kind="data", name="rated"):
    """Files and texts with a number in tables with columns image, text, target."""

    def read_file(self, source: Manifest, known: Sequence[str]) -> list[Any]:
        return targets.read_targets(source, self.columns, self.inputs, self.may_lack)


class CaptionSection(DataSection):
    """Files with captions."""


class CaptionsConfig(TableSection, CaptionSection, kind="data", name="captions"):
    """Files with captions in tables with columns image and text."""

    texts: bool = True
    missing: tuple[str, ...] = MISSING

    def read_file(self, source: Manifest, known: Sequence[str]) -> list[Any]:
        return captions.read_captions(source, self.columns, self.missing, self.inputs, self.texts)


def of_kinds(samples: Sequence[Any], kinds: Sequence[str], where: str, some: bool = True) -> Sequence[Any]:
    """The samples of one of the ``kinds`` (none named: all); DataError where there must be ``some`` and are none."""
    there = list(column(samples, "kind")) if kinds else []
    kept = take(samples, [i for i, kind in enumerate(there) if kind in kinds]) if kinds else samples
    if some and not kept:
        there = sorted(set(there))
        raise DataError(f"{where} holds no sample of kind {', '.join(kinds)}: it has {', '.join(there)}")
    return kept


def split_file(splits: Mapping[str, str], split: str, setting: str = "splits", also: Iterable[str] = ()) -> str:
    """The file of a split; ``also``: splits without one."""
    if split not in splits:
        draw = f", or draw it with data.{split}_share" if setting == "splits" and split in ("val", "test") else ""
        raise ConfigError(f"data.{setting} has no {split!r}: choose one of {', '.join([*splits, *also])}{draw}")
    return splits[split]


def there(splits: Mapping[str, str], root: Path) -> list[str]:
    return [split for split, name in splits.items() if (root / name).exists()] or list(splits)


def limit(samples: Sequence[Any], count: int | None) -> Sequence[Any]:
    """At most ``count`` samples, evenly spread over the list."""
    count = len(samples) if count is None else min(count, len(samples))
    return take(samples, [i * len(samples) // count for i in range(count)]) if count < len(samples) else samples[:]


def portion(samples: Sequence[Any], fraction: float) -> Sequence[Any]:
    """``fraction`` of the samples, at least one of them, evenly spread over the list."""
    return limit(samples, max(1, round(fraction * len(samples))))
