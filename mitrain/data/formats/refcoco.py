"""Referring expressions and masks from the files of RefCOCO, RefCOCO+, RefCOCOg and RefCLEF.

The layout is that of github.com/lichengunc/refer: ``ROOT/DATASET/refs(SPLIT_BY).p`` holds references, each with its
sentences (`references`); ``ROOT/DATASET/instances.json`` holds COCO's images and annotations. A reference
with several targets, as gRefCOCO has, is of their union; one without is left out, and counted. A reference's own key
``reference`` names a second picture beside the first, the input of that name.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mitrain.core.errors import DataError
from mitrain.data.formats.references import Reference, field, id_of, once, read_json, read_refs, refs_file
from mitrain.data.formats.rle import check_segmentation, decode_mask
from mitrain.data.formats.rows import folder_in
from mitrain.data.samples import Sample

MAX_PIXELS = 1 << 28  # of a mask
IMAGE_FOLDERS = {"refclef": ("images/saiapr_tc-12", "saiapr_tc-12")}
COCO_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferSample(Sample):
    """One expression about a picture, the input ``image`` below :func:`image_folder`; ``size`` is its (height, width). The
    input ``reference`` is a second picture, which the expression may speak of.

    ``object`` is the name of the target's category (of several, their names), ``present`` the names of all objects
    annotated in the picture, the target's among them; ``kind`` is what an expression of a composed scene needs (name,
    horizontal, vertical, size) and empty elsewhere.
    """

    expression: str
    size: tuple[int, int]
    segmentation: Any = None
    object: str = ""
    kind: str = ""
    present: tuple[str, ...] = ()

    def fault(self) -> str:
        """What is wrong with the segmentation, or ""."""
        try:
            check_segmentation(self.segmentation, self.size)
        except ValueError as error:
            return f"its segmentation is broken: {error}"
        return ""

    def mask(self) -> np.ndarray:
        """(h, w) bool. Raises DataError, naming the sample, where the segmentation makes no sense."""
        try:
            return decode_mask(self.segmentation, self.size)
        except ValueError as error:
            raise DataError(f"the segmentation of {self.id} is broken ({error}): mend or remove that annotation") from None


def read_refer(root: Path, dataset: str, split_by: str | None, split: str, images: str | None = None) -> list[ReferSample]:
    """Every expression of a split, in the file's order.

    ``split_by`` may be left out where there is one ``refs(*).p``. As in refer.py, ``test`` selects every test split
    and ``testA`` also ``testAB``. ``images`` is the folder of the pictures where it is not the usual one. Raises
    DataError naming file and field of the first thing that is wrong.
    """
    image_folder(root, dataset, images)
    path = refs_file(root, dataset, split_by)
    refs = [ref for ref in read_refs(path) if selects(split, ref.split)]
    if not refs:
        known = ", ".join(split_names(root, dataset, split_by))
        raise DataError(f"{str(path)!r} has no references in the split {split!r}: choose one of {known}")
    tables = read_instances(path.with_name("instances.json"))
    samples = [sample for ref in refs if ref.targets for sample in samples_of(ref, tables, dataset)]
    nothing = sum(len(ref.sentences) for ref in refs if not ref.targets)
    if nothing:
        log.warning("%s: left out %d sentences without a target in the split %s", path, nothing, split)
    wordless = sum(not sample.expression for sample in samples)
    if wordless:
        log.warning("%s: left out %d sentences without words in the split %s", path, wordless, split)
    kept = [sample for sample in samples if sample.expression]
    if not kept:
        raise DataError(f"{str(path)!r} has no sentence with words in the split {split!r}: get the original file")
    return kept


def read_objects(root: Path, dataset: str, split_by: str | None, split: str) -> list[ReferSample]:
    """Every object annotated in a split's pictures, as samples without words."""
    path = refs_file(root, dataset, split_by)
    pictures = {ref.image for ref in read_refs(path) if selects(split, ref.split)}
    tables = read_instances(path.with_name("instances.json"))
    return [
        ReferSample(number, {"image": image["file_name"]}, "", size_of(image, number), annotation.get("segmentation"))
        for number, annotation in tables.annotations.items()
        if known_id(annotation, "image_id") in pictures and (image := tables.images.get(known_id(annotation, "image_id")))
    ]


def split_names(root: Path, dataset: str, split_by: str | None = None) -> list[str]:
    """The splits that the references name, the most frequent first."""
    counts = Counter(ref.split for ref in read_refs(refs_file(root, dataset, split_by)))
    return [name for name, _ in counts.most_common()]


def image_folder(root: Path, dataset: str, images: str | None = None) -> Path:
    """Where the pictures are: ``images`` (absolute or below ``root``), else the first usual folder that exists."""
    places = (images,) if images else IMAGE_FOLDERS.get(dataset, COCO_FOLDERS)
    return Path(root) / folder_in(Path(root), places, "put it there or set data.images=FOLDER")


def selects(split: str, of_ref: str) -> bool:
    if split in ("testA", "testB", "testC"):
        return of_ref.startswith("test") and split[-1] in of_ref[4:]
    return "test" in of_ref if split == "test" else of_ref == split


# instances


class Instances:
    """COCO's tables of images, annotations and categories by id."""

    def __init__(self, path: Path):
        self.where = str(path)
        tables = read_json(path)
        self.images = self.by_id(field(tables, "images", list, repr(self.where)), "image")
        self.annotations = self.by_id(field(tables, "annotations", list, repr(self.where)), "annotation")
        categories = field(tables, "categories", list, repr(self.where)) if "categories" in tables else []
        self.categories = self.by_id(categories, "category")

    def by_id(self, rows: list, what: str) -> dict[str, dict]:
        """Rows by id; those that stand there twice in the same words count once."""
        rows_by_id: dict[str, dict] = {}
        for number, row in enumerate(rows):
            key = id_of(row, "id", f"{self.where!r}: {what} {number}")
            if rows_by_id.setdefault(key, row) != row:
                raise DataError(
                    f"{self.where!r}: {what} {number} has the id {key[:80]!r} of another {what}: make ids unique"
                )
        return rows_by_id

    def category(self, annotation: Mapping[str, Any]) -> str:
        name = self.categories.get(known_id(annotation, "category_id"), {}).get("name")
        return name if isinstance(name, str) else ""

    @cached_property
    def present(self) -> dict[str, tuple[str, ...]]:
        """The category names of every image's annotations, whether or not an expression refers to them."""
        names: dict[str, set[str]] = defaultdict(set)
        for annotation in self.annotations.values():
            names[known_id(annotation, "image_id")].add(self.category(annotation))
        return {image: tuple(sorted(texts - {""})) for image, texts in names.items()}


def known_id(annotation: Mapping[str, Any], key: str) -> str:
    """The id that an annotation has there, or ""."""
    try:
        return id_of(annotation, key, "")
    except DataError:
        return ""


read_instances = once(Instances)


def samples_of(ref: Reference, tables: Instances, dataset: str) -> list[ReferSample]:
    """One sample for each sentence of a reference."""
    where = f"{dataset}: reference {ref.id[:80]}"
    image = looked_up(tables.images, ref.image, "image_id", where, tables.where)
    targets = [looked_up(tables.annotations, one, "ann_id", where, tables.where) for one in ref.targets]
    if any("image_id" in target and known_id(target, "image_id") != ref.image for target in targets):
        raise DataError(f"{where} and its annotation are of different images in {tables.where!r}: get matching files")
    here = f"{tables.where!r}: image {ref.image[:80]}"
    size = size_of(image, here)
    things = " and ".join(sorted({tables.category(target) for target in targets} - {""}))
    shared = (size, union(ref, targets, tables.where), things, ref.kind, tables.present.get(ref.image, ()))
    there = {"image": field(image, "file_name", str, here)} | ({"reference": ref.reference} if ref.reference else {})
    return [ReferSample(f"{dataset}/{ref.id}/{number}"[:200], there, words, *shared) for number, words in ref.sentences]


def size_of(image: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(height, width) that an image's row says."""
    size = (field(image, "height", int, where), field(image, "width", int, where))
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"{where} has an impossible height and width: get the original file")
    return size


def looked_up(table: Mapping[str, dict], number: str, key: str, where: str, file: str) -> dict:
    if number not in table:
        raise DataError(f"{where} has {key}={number[:80]}, which {file!r} lacks: get matching files")
    return table[number]


def union(ref: Reference, targets: Sequence[Mapping[str, Any]], file: str) -> Any:
    """The segmentation of all targets together: COCO's parts of a mask are united."""
    masks = [
        field(target, "segmentation", list | dict, f"{file!r}: annotation {number[:80]}")
        for number, target in zip(ref.targets, targets, strict=True)
    ]
    return masks[0] if len(masks) == 1 else [part for mask in masks for part in (mask if isinstance(mask, list) else [mask])]
