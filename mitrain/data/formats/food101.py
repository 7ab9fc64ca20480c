"""UPMC-Food101: recipe pictures with the titles of their web pages, 101 classes.

As distributed: ``images/{train,test}/CLASS/CLASS_N.jpg`` and ``texts/{train,test}_titles.csv`` with rows image, title,
class (no header, titles not always quoted). The derived layout of missing-aware prompts is read where it is there:
``split.json`` {train, val, test: [image]}, ``text.json`` {image: title} and ``class_idx.json`` {class: number}.
A class is an image's name up to its last "_"; the number behind it may have a part (``cheese_plate_717-2.jpg``).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from mitrain.core import parsing
from mitrain.core.errors import DataError
from mitrain.data.formats.labels import LabelSample, check_known, counted
from mitrain.data.formats.rows import open_text, read_table, reading, unique

SPLITS = ("train", "val", "test")
IMAGE = re.compile(r"([^/\\\0]+)_\d+(-\d+)?\.\w+")


def read_food101(root: Path, split: str, val_share: float, known: Collection[str] = ()) -> list[LabelSample]:
    """A split's samples in the file's order; those without a title are left out, and counted.

    The distributed files have no validation: ``val_share`` of the training images, chosen by their names, is taken for
    it. Where classes are ``known``, others are refused. Raises DataError naming file and line.
    """
    root = Path(root)
    if split not in SPLITS:
        raise DataError(f"UPMC-Food101 has no split {split!r}: choose one of {', '.join(SPLITS)}")
    where = root / "split.json"
    rows = derived(root, split) if where.is_file() else distributed(root, split, val_share)
    left_out: Counter[str] = Counter()
    rows = ((place, sample) for place, sample in rows if check_known(sample.labels, known, place))
    samples = [sample for sample in unique(rows) if sample.text or left_out.update(["without a title"])]
    nothing = f"{str(root)!r} has no sample with a title in the split {split!r}: get the original files"
    return counted(samples, left_out, f"{root}: {split}", nothing)


def class_of(image: str, where: str) -> str:
    """ "apple_pie_12.jpg" → "apple_pie"."""
    match = IMAGE.fullmatch(image)
    if not match:
        raise DataError(f"{where}: {image[:80]!r} is no image name like apple_pie_12.jpg: get the original file")
    return match[1]


def sample_of(image: str, text: str, folder: str, where: str) -> tuple[str, LabelSample]:
    label = class_of(image, where)
    return where, LabelSample(image, {"image": f"images/{folder}/{label}/{image}"}, " ".join(text.split()), (label,))


# as distributed


def distributed(root: Path, split: str, val_share: float) -> Iterator[tuple[str, LabelSample]]:
    folder = "test" if split == "test" else "train"
    path = root / "texts" / f"{folder}_titles.csv"
    with reading(path, "put texts/ and images/ below data.root"), open_text(path) as file:
        lines = list(records(parsing.lines_of(file), path))
    titled = [image for _, image, title in lines if title]
    held_out = frozenset() if split == "test" else validation(titled, val_share)
    for line, image, title in lines:
        if split == "test" or (image in held_out) == (split == "val"):
            yield sample_of(image, title, folder, f"{path}:{line}")


def records(lines: Iterable[str], path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, image and title of every record.

    Titles come from web pages: commas and quotes in them are not always quoted, which no reader of CSV forgives. The
    class behind the title is known from the image before it, so a record ends with the line that ends with its class.
    """
    first, image, label, parts = 0, "", "", []
    for number, line in enumerate(lines, start=1):
        cell, _, rest = line.strip().partition(",")
        cell = unquoted(cell)
        if parts and IMAGE.fullmatch(cell):
            break
        if parts:  # a title of several lines
            rest = line.strip()
        elif not line.strip() or (number == 1 and not any(map(str.isdigit, cell))):  # blank, or an added header
            continue
        else:
            first, image, label = number, cell, class_of(cell, f"{path}:{number}")
        title, comma, last = rest.rpartition(",")
        if comma and unquoted(last) == label:
            yield first, image, unquoted("\n".join([*parts, title]))
            parts = []
        else:
            parts.append(rest)
    if parts:
        raise DataError(
            f"{path}:{first}: the record does not end with the class {label[:80]!r} of its image {image[:80]!r}: "
            "write image, title, class, or correct one"
        )


def unquoted(cell: str) -> str:
    """A cell without blanks around it and without the quotes of CSV."""
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def validation(images: Iterable[str], share: float) -> frozenset[str]:
    """The images of validation: by a digest of their names, the same on every machine; one at least, of two or more."""
    places = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") for name in images}
    chosen = frozenset(name for name, place in places.items() if place < share * 2**32)
    return chosen or frozenset(sorted(places, key=places.__getitem__)[: len(places) > 1])


# the derived layout


def derived(root: Path, split: str) -> Iterator[tuple[str, LabelSample]]:
    images = read_table(root / "split.json").get(split)
    where = str(root / "split.json")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{where}: {split!r} is no list of image names: get the original file")
    texts = read_table(root / "text.json")
    classes = read_table(root / "class_idx.json") if (root / "class_idx.json").is_file() else None
    for number, image in enumerate(images):
        here = f"{where}: {split} {number}"
        text = title_of(texts.get(image, ""), f"{root / 'text.json'}: {image[:80]!r}")
        if classes is not None and class_of(image, here) not in classes:
            raise DataError(f"{here}: the class of {image[:80]!r} is not in class_idx.json: get matching files")
        yield sample_of(image, text, "test" if split == "test" else "train", here)


def title_of(value: Any, where: str) -> str:
    """A title, or the first of several."""
    value = next(iter(value), "") if isinstance(value, list) else value
    if not isinstance(value, str):
        raise DataError(f"{where} is a {type(value).__name__} instead of a title: get the original file")
    return value
