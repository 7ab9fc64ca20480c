"""The data set ``tuxpaint-captions``: photographs and drawings with a human's caption and a category, split by object.

For classification (picture and caption → category) and for retrieval (picture ⇄ caption). No object is in two splits,
no caption, no picture and none that is nearly the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain_demo.pairs import write_karpathy, write_splits, write_summary
from mitrain_demo.stamps import CATEGORIES, Stamp, read_stamps
from mitrain_demo.tuxpaint import SHARES, image_path, on_plain_ground, split_kinds, write_texts

NAME = "tuxpaint-captions"

README = """Tux Paint stamps with their captions, made by mitrain from the Debian package tuxpaint-stamps-default.

Pictures and captions: the Tux Paint contributors, GPL-2 as a whole (see COPYRIGHT). Cropped, scaled down and put on a
plain ground; captions as written, categories from the folders, some corrected by hand. The splits are drawn from a seed.

{split}.jsonl: one picture a line: id, image, text (the caption), label (the category), object.
dataset_tuxpaint-captions.json: the same for retrieval, in the layout of Karpathy's dataset_*.json.
summary.json: counts and the share of the most frequent category.
"""


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian package ``archives[0]``. Raises PrepareError."""
    collection = read_stamps(archives[0])
    write_texts(collection, target, README)
    pictures = [on_plain_ground(stamp.image) for stamp in collection.stamps]
    stamps = grouped(collection.stamps, pictures)
    splits = split_kinds(stamps, seed)
    rows = {split: [record(s) for s in stamps if splits[s.kind] == split] for split in SHARES}
    for stamp, picture in zip(stamps, pictures, strict=True):
        path = target / image_path(stamp)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    write_splits(target, rows)
    write_karpathy(target, NAME, rows)
    write_summary(target, rows)


def grouped(stamps: Sequence[Stamp], pictures: Sequence[Image.Image]) -> list[Stamp]:
    """The stamps with one kind for all that must share a split: same object, same caption, nearly the same picture."""
    pairs = near_pairs(np.stack([fingerprint(picture) for picture in pictures]))
    groups = merged(len(stamps), pairs, [s.kind for s in stamps], [s.caption.casefold() for s in stamps])
    return [replace(stamp, kind=stamps[group].kind) for stamp, group in zip(stamps, groups, strict=True)]


def record(stamp: Stamp) -> dict:
    return {
        "id": stamp.path.removesuffix(".png"),
        "image": image_path(stamp),
        "text": stamp.caption,
        "label": CATEGORIES[stamp.category][0],
        "object": stamp.kind,
    }
