"""Referring expressions and masks from the files of RefCOCO, RefCOCO+, RefCOCOg and RefCLEF.

The layout is that of github.com/lichengunc/refer: ``ROOT/DATASET/refs(SPLIT_BY).p`` is a pickled list of references
(written by Python 2), each with its sentences; ``ROOT/DATASET/instances.json`` holds COCO's images and annotations.
A pickle can run any program, so this one is read by an unpickler that knows nothing but plain containers and values.
"""

import io
import json
import logging
import pickle
import pickletools
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mitrain.data.rle import check_segmentation, decode_mask
from mitrain.data.rows import PACKED
from mitrain.errors import DataError

MAX_BYTES = 4 << 30  # of an annotation file
MAX_PIXELS = 1 << 28  # of a mask
HUGE = 1 << 63  # no number in these files
IMAGE_FOLDERS = {"refclef": ("images/saiapr_tc-12", "saiapr_tc-12")}
COCO_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "images")
OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferSample:
    """One expression. ``image`` is below :func:`image_folder`; ``size`` is the picture's (height, width).

    ``object`` is the name of the target's category, ``present`` the names of all objects annotated in the picture, the
    target's among them; ``kind`` is what an expression of a composed scene needs (name, horizontal, vertical, size) and
    empty elsewhere.
    """

    id: str
    image: str
    expression: str
    size: tuple[int, int]
    segmentation: Any = None
    object: str = ""
    kind: str = ""
    present: tuple[str, ...] = ()

    @classmethod
    def unlabelled(cls, id: str, image: str, expression: str, size: tuple[int, int]) -> "ReferSample":
        return cls(id, image, expression, size)

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
            raise DataError(
                f"the segmentation of {self.id} is broken ({error}): mend or remove that annotation"
            ) from None


def read_refer(
    root: Path, dataset: str, split_by: str | None, split: str, images: str | None = None
) -> list[ReferSample]:
    """Every expression of a split, in the file's order.

    ``split_by`` may be left out where there is one ``refs(*).p``. As in refer.py, ``test`` selects every test split
    and ``testA`` also ``testAB``. ``images`` is the folder of the pictures where it is not the usual one. Raises
    DataError naming file and field of the first thing that is wrong.
    """
    image_folder(root, dataset, images)
    path = refs_file(root, dataset, split_by)
    refs = [ref for ref in read_refs(path) if selects(split, ref["split"])]
    if not refs:
        known = ", ".join(split_names(root, dataset, split_by))
        raise DataError(f"{str(path)!r} has no references in the split {split!r}: choose one of {known}")
    tables = read_instances(path.with_name("instances.json"))
    samples = [sample for ref in refs for sample in samples_of(ref, tables, dataset)]
    wordless = sum(not sample.expression for sample in samples)
    if wordless:
        log.warning("%s: left out %d sentences without words in the split %s", path, wordless, split)
    kept = [sample for sample in samples if sample.expression]
    if not kept:
        raise DataError(f"{str(path)!r} has no sentence with words in the split {split!r}: get the original file")
    return kept


def split_names(root: Path, dataset: str, split_by: str | None = None) -> list[str]:
    """The splits that the references name, the most frequent first."""
    counts = Counter(ref["split"] for ref in read_refs(refs_file(root, dataset, split_by)))
    return [name for name, _ in counts.most_common()]


def image_folder(root: Path, dataset: str, images: str | None = None) -> Path:
    """Where the pictures are: ``images`` (absolute or below ``root``), else the first usual folder that exists."""
    places = (images,) if images else IMAGE_FOLDERS.get(dataset, COCO_FOLDERS)
    for place in places:
        if (Path(root) / place).is_dir():
            return Path(root) / place
    raise DataError(f"no picture folder {' or '.join(places)} in {str(root)!r}: put it there or set data.images=FOLDER")


def selects(split: str, of_ref: str) -> bool:
    if split in ("testA", "testB", "testC"):
        return of_ref.startswith("test") and split[-1] in of_ref[4:]
    return "test" in of_ref if split == "test" else of_ref == split


def refs_file(root: Path, dataset: str, split_by: str | None) -> Path:
    folder = Path(root) / dataset
    if not folder.is_dir():
        raise DataError(f"no folder {dataset!r} in {str(root)!r}: set data.dataset to the folder that holds refs(*).p")
    there = sorted(folder.glob("refs(*).p"))
    choices = ", ".join(path.name.removeprefix("refs(").removesuffix(").p") for path in there) or "none"
    if split_by is None and len(there) == 1:
        return there[0]
    path = folder / f"refs({split_by}).p"
    if split_by is None or path not in there:
        wrong = "data.split_by is not set" if split_by is None else f"there is no {path.name}"
        raise DataError(f"{wrong} in {str(folder)!r}: choose data.split_by from: {choices}")
    return path


def read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{str(path)!r} has more than {MAX_BYTES} bytes: this is no annotation file")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error}): put the file there") from None
    if content.startswith(PACKED):
        raise DataError(f"{str(path)!r} is compressed: unpack it")
    return content


def once(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Keep what ``read`` made of the last file until that file changes: every split asks for the same one."""

    @lru_cache(maxsize=1)
    def kept(path: Path, changed: int, size: int) -> Any:
        return read(path)

    def reader(path: Path) -> Any:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {str(path)!r} ({error}): put the file there") from None
        return kept(path, stat.st_mtime_ns, stat.st_size)

    return reader


# references


class Opcodes(dict):
    """An unpickler's table of opcodes that says which one it does not admit."""

    def __missing__(self, code: int):
        known = pickletools.code2op.get(chr(code))
        raise pickle.UnpicklingError(f"it holds more than plain values (opcode {known.name if known else code})")


class PlainUnpickler(pickle._Unpickler):
    """Reads containers, strings and numbers; nothing that names a class or calls a function is even parsed.

    The pure Python unpickler is the base because its table of opcodes can be cut down, and because the C one
    allocates whatever size a hostile file claims.
    """

    dispatch = Opcodes(
        {
            ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]
            for op in pickletools.opcodes
            if op.name in OPCODES.split()
        }
    )

    def _decode_string(self, value: bytes) -> str:
        """Python 2's byte strings, most of them ASCII."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")


@once
def read_refs(path: Path) -> list[dict[str, Any]]:
    """The references, each with the fields that we use."""
    content = read_bytes(path)
    try:
        refs = PlainUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        why = str(error)[:80] or "it ends too early"
        raise DataError(f"{str(path)!r} is not a pickle of plain values ({why}): get the original file") from None
    except (struct.error, OverflowError, MemoryError) as error:
        raise DataError(f"{str(path)!r} is a torn pickle ({str(error)[:80]}): get the original file") from None
    if not isinstance(refs, list) or not refs:
        raise DataError(f"{str(path)!r} holds {brief(refs)} instead of a list of references: get the original file")
    for number, ref in enumerate(refs):
        check_ref(ref, f"{str(path)!r}: reference {number}")
    return refs


def check_ref(ref: Any, where: str) -> None:
    field(ref, "ref_id", int | str, where)
    field(ref, "ann_id", int | str, where)
    field(ref, "image_id", int | str, where)
    field(ref, "split", str, where)
    for sentence in field(ref, "sentences", list, where):
        field(sentence, "sent_id", int | str, where)
        field(sentence, "sent", str, where)


def field(record: Any, key: str, kind: Any, where: str) -> Any:
    """``record[key]``, if it is there and of that kind."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is {brief(record)} instead of a dictionary: get the original file")
    if key not in record:
        raise DataError(f"{where} has no {key!r}: get the original file")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= HUGE):
        raise DataError(f"{where} has the impossible {key}={brief(value)}: get the original file")
    return value


def brief(value: Any) -> str:
    """A value in a few characters, whatever it is."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, int | float | None) and abs(value or 0) < HUGE:
        return repr(value)
    return f"a {type(value).__name__}"


# instances


class Instances:
    """COCO's tables of images, annotations and categories by id."""

    def __init__(self, path: Path):
        self.where = str(path)
        try:
            tables = json.loads(read_bytes(path))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where!r} is not valid JSON ({str(error)[:80]}): get the original file") from None
        self.images = self.by_id(field(tables, "images", list, repr(self.where)), "image")
        self.annotations = self.by_id(field(tables, "annotations", list, repr(self.where)), "annotation")
        categories = field(tables, "categories", list, repr(self.where)) if "categories" in tables else []
        self.categories = self.by_id(categories, "category")

    def by_id(self, rows: list, what: str) -> dict[int | str, dict]:
        where = f"{self.where!r}: {what}"
        return {field(row, "id", int | str, f"{where} {number}"): row for number, row in enumerate(rows)}

    def category(self, annotation: Mapping[str, Any]) -> str:
        number = annotation.get("category_id")
        row = self.categories.get(number, {}) if isinstance(number, int | str) else {}
        return row["name"] if isinstance(row.get("name"), str) else ""

    @cached_property
    def present(self) -> dict[int | str, tuple[str, ...]]:
        """The category names of every image's annotations, whether or not an expression refers to them."""
        names: dict[int | str, set[str]] = defaultdict(set)
        for annotation in self.annotations.values():
            image = annotation.get("image_id")
            if isinstance(image, int | str):
                names[image].add(self.category(annotation))
        return {image: tuple(sorted(found - {""})) for image, found in names.items()}


read_instances = once(Instances)


def samples_of(ref: Mapping[str, Any], tables: Instances, dataset: str) -> list[ReferSample]:
    """One sample for each sentence of a reference."""
    where = f"{dataset}: reference {brief(ref['ref_id'])}"
    annotation, image = tables.annotations.get(ref["ann_id"]), tables.images.get(ref["image_id"])
    for key, found in (("ann_id", annotation), ("image_id", image)):
        if found is None:
            raise DataError(f"{where} has {key}={brief(ref[key])}, which {tables.where!r} lacks: get matching files")
    if annotation.get("image_id", ref["image_id"]) != ref["image_id"]:
        raise DataError(f"{where} and its annotation are of different images in {tables.where!r}: get matching files")
    here = f"{tables.where!r}: image {brief(ref['image_id'])}"
    size = (field(image, "height", int, here), field(image, "width", int, here))
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"{here} has an impossible height and width: get the original file")
    segmentation = field(
        annotation, "segmentation", list | dict, f"{tables.where!r}: annotation {brief(ref['ann_id'])}"
    )
    kind = ref.get("kind", "") if isinstance(ref.get("kind", ""), str) else ""
    shared = (size, segmentation, tables.category(annotation), kind, tables.present.get(ref["image_id"], ()))
    file_name = field(image, "file_name", str, here)
    return [
        ReferSample(f"{dataset}/{ref['ref_id']}/{sentence['sent_id']}"[:200], file_name, words(sentence), *shared)
        for sentence in ref["sentences"]
    ]


def words(sentence: Mapping[str, Any]) -> str:
    """The cleaned sentence, or the raw one where cleaning left nothing."""
    raw = sentence.get("raw", "")
    return sentence["sent"].strip() or (raw.strip() if isinstance(raw, str) else "")
