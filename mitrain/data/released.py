"""The sections ``data`` of published data sets in their own files."""

from pathlib import Path
from typing import Any

from pydantic import Field

from mitrain.data.formats import captions, coco, food101, mmimdb, mmsa, msrvtt, snli_ve
from mitrain.data.formats.rows import is_table
from mitrain.data.sources import CaptionSection, ClassSection, DataSection, TargetSection, of_kinds, split_file, there


class Food101Config(ClassSection, kind="data", name="food101"):
    """UPMC-Food101 in its own files. ``val_share``: of the training images that become validation, where the files have
    none."""

    val_share: float = Field(0.07, gt=0, lt=1)

    def read(self, root: Path, split: str) -> list[Any]:
        return food101.read_food101(root, split, self.val_share, self.known(root, split))

    def split_names(self, root: Path) -> list[str]:
        return list(food101.SPLITS)


class MmimdbConfig(ClassSection, kind="data", name="mmimdb"):
    """MM-IMDB in its own files, with its 23 genres."""

    classes: tuple[str, ...] = mmimdb.GENRES
    multilabel: bool = True

    def read(self, root: Path, split: str) -> list[Any]:
        return mmimdb.read_mmimdb(root, split, self.classes or mmimdb.GENRES)

    def split_names(self, root: Path) -> list[str]:
        return mmimdb.split_names(root)


class SnliVeConfig(ClassSection, kind="data", name="snli-ve"):
    """SNLI-VE in its own files. ``images``: the folder of Flickr30k's pictures, where it is not a usual one."""

    classes: tuple[str, ...] = snli_ve.CLASSES
    images: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        return snli_ve.read_snli_ve(root, split, self.images, self.classes or snli_ve.CLASSES)

    def split_names(self, root: Path) -> list[str]:
        return there({split: snli_ve.file_of(split) for split in ("train", "val", "test")}, root)


class MmsaConfig(TargetSection, kind="data", name="mmsa"):
    """Clips with a sentiment in MMSA's files: CMU-MOSI, CMU-MOSEI, CH-SIMS. A clip is both a sample's video and its sound;
    a pickle's arrays are audio and vision."""

    takes_inputs = True

    file: str = "label.csv"
    clips: str = "Raw"
    labels: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        if is_table(Path(self.file)):
            return mmsa.read_clips(root, self.file, split, self.inputs, self.labels or "label", self.clips)
        return mmsa.read_features(root, self.file, split, self.inputs, self.labels or "regression_labels")

    def split_names(self, root: Path) -> list[str]:
        return mmsa.parts_in(root, self.file)


class KarpathyConfig(CaptionSection, kind="data", name="karpathy"):
    """COCO or Flickr30k in Karpathy's ``dataset_*.json``."""

    file: str | None = None
    images: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        return captions.read_karpathy(root, self.file, split, self.images)

    def split_names(self, root: Path) -> list[str]:
        return captions.karpathy_splits(root, self.file)


class VqaConfig(DataSection, kind="data", name="vqa"):
    """VQA's questions about COCO's pictures and their answers (VQA v1, v2, OK-VQA), in their own files."""

    subsets: dict[str, str] = {"train": "train2014", "val": "val2014"}
    images: str | None = None
    kinds: tuple[str, ...] = ()

    def read(self, root: Path, split: str) -> list[Any]:
        samples = coco.read_vqa(root, split_file(self.subsets, split, "subsets"), self.images)
        return of_kinds(samples, self.kinds, f"{root}: {split}")

    def split_names(self, root: Path) -> list[str]:
        return coco.subsets_there(root, coco.QUESTIONS, self.subsets)


class CocoCaptionsConfig(CaptionSection, kind="data", name="coco-captions"):
    """COCO's captions in their own files. ``subsets`` and ``images`` as of `VqaConfig`."""

    subsets: dict[str, str] = {"train": "train2017", "val": "val2017"}
    images: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        return coco.read_coco_captions(root, split_file(self.subsets, split, "subsets"), self.images)

    def split_names(self, root: Path) -> list[str]:
        return coco.subsets_there(root, coco.CAPTIONS, self.subsets)


class MsrvttConfig(CaptionSection, kind="data", name="msr-vtt"):
    """MSR-VTT's captions of videos in its own files. ``videos``: the videos' folder, where it is not a usual one."""

    takes_inputs = True

    videos: str | None = None

    def read(self, root: Path, split: str) -> list[Any]:
        return msrvtt.read_msrvtt(root, split, self.inputs, self.videos)

    def split_names(self, root: Path) -> list[str]:
        return msrvtt.splits_in(root)
