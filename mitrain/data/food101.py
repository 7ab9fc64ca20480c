"""UPMC-Food101: recipe pictures with the titles of their web pages, 101 classes.

As distributed: ``images/{train,test}/CLASS/CLASS_N.jpg`` and ``texts/{train,test}_titles.csv`` with rows image, title,
class (no header, titles not always quoted). The derived layout of missing-aware prompts is read where it is there:
``split.json`` {train, val, test: [image]}, ``text.json`` {image: title} and ``class_idx.json`` {class: number}.
A class is an image's name up to its last "_".
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mitrain.data.labels import LabelSample, report_left_out
from mitrain.data.rows import cells_of_csv, read_table, unique
from mitrain.errors import DataError

SPLITS = ("train", "val", "test")


def read_food101(root: Path, split: str, val_share: float) -> list[LabelSample]:
    """A split's samples in the file's order; those without a title are left out, and counted.

    The distributed files have no validation: ``val_share`` of the training images, chosen by their names, is taken for
    it. Raises DataError naming file and line.
    """
    root = Path(root)
    if split not in SPLITS:
        raise DataError(f"UPMC-Food101 has no split {split!r}: choose one of {', '.join(SPLITS)}")
    where = root / "split.json"
    rows = derived(root, split) if where.is_file() else distributed(root, split, val_share)
    left_out: Counter[str] = Counter()
    samples = [sample for sample in unique(rows) if sample.text or left_out.update(["without a title"])]
    report_left_out(samples, left_out, f"{root}: {split}")
    if not samples:
        raise DataError(f"{str(root)!r} has no sample with a title in the split {split!r}: get the original files")
    return samples


def class_of(image: str, where: str) -> str:
    """ "apple_pie_12.jpg" → "apple_pie"."""
    name, _, number = image.rpartition("_")
    if not name or not number.rpartition(".")[0].isdigit() or "/" in image or "\\" in image:
        raise DataError(f"{where}: {image[:80]!r} is no image name like apple_pie_12.jpg: get the original file")
    return name


def sample_of(image: str, text: str, folder: str, where: str) -> tuple[str, LabelSample]:
    label = class_of(image, where)
    return where, LabelSample(image, f"images/{folder}/{label}/{image}", " ".join(text.split()), (label,))


# as distributed


def distributed(root: Path, split: str, val_share: float) -> Iterator[tuple[str, LabelSample]]:
    folder = "test" if split == "test" else "train"
    path = root / "texts" / f"{folder}_titles.csv"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, cells in cells_of_csv(file, path):
                if not cells or (line == 1 and not has_number(cells[0])):  # a blank line, a header that others added
                    continue
                where = f"{path}:{line}"
                image, title = image_and_title(cells, where)
                if split == "test" or in_val(image, val_share) == (split == "val"):
                    yield sample_of(image, title, folder, where)
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text ({error}): save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error}): put texts/ and images/ below data.root") from None


def has_number(cell: str) -> bool:
    return any(character.isdigit() for character in cell)


def image_and_title(cells: list[str], where: str) -> tuple[str, str]:
    """The first cell, and all between it and the last: a title that was not quoted may hold commas."""
    if len(cells) < 3:
        raise DataError(f"{where}: {len(cells)} cell(s) instead of image, title, class: get the original file")
    image, label = cells[0].strip(), cells[-1].strip()
    if class_of(image, where) != label:
        raise DataError(f"{where}: {image[:80]!r} is of the class {label[:80]!r} here: quote commas, or correct one")
    return image, ",".join(cells[1:-1])


def in_val(image: str, share: float) -> bool:
    """Whether an image is of validation: by a digest of its name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(image.encode()).digest()[:4], "big") < share * 2**32


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
