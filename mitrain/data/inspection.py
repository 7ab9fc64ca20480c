"""What a data set holds, and what is wrong with it: ``mitrain data inspect``.

Sizes, pictures that are missing or broken, the distribution of answers or of mask areas, whatever two splits share
that they should not, and a sheet of samples to look at.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mitrain.core.errors import DataError
from mitrain.core.files import write_atomic
from mitrain.data.images import MAX_PIXELS, Decoded, Facts, Size, annotated_image, open_image
from mitrain.data.index import PictureIndex, ahead

EXAMPLES, LONGEST = 5, 200  # named of each kind of trouble; characters of a name
THUMBNAIL, COLUMNS, LINES = 176, 6, 4  # of the sheet: pixels, samples of a split, lines of text under each
RED = np.array([230, 30, 30])

Samples = Sequence[Any]


@dataclass(frozen=True)
class Picture:
    """``digest`` of its pixels, or the ``error`` that stopped us from reading it.

    ``misfit``: why it is not the picture that its annotation was made on. ``note``: how the two were brought together.
    """

    digest: str = ""
    error: str = ""
    misfit: str = ""
    note: str = ""
    unlike_index: bool = False  # its content is not what the picture index said of a file with these times


def inspect_splits(
    kind: Any,
    splits: Mapping[str, Samples],
    root: Path,
    sheet: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    cache: Path | None = None,
) -> tuple[dict[str, Any], str]:
    """A report as JSON values and as text to print; ``sheet`` is where the PNG with samples is written.

    ``kind``: the task that the samples are for (a subclass of `mitrain.tasks.base.Task`), which describes them.
    ``root`` is the folder that the samples' pictures are in. Reads every picture once, and puts the index of ``cache``
    right where it is not what is there.
    """
    index = PictureIndex(root, cache / "index" if cache else None, max_pixels)
    pictures = {split: read_pictures(samples, index) for split, samples in splits.items()}
    index.publish()
    report: dict[str, Any] = {
        "splits": {split: describe(kind, samples, pictures[split]) for split, samples in splits.items()},
        "shared": [
            overlap
            for one, other in combinations(splits, 2)
            for overlap in compare(one, other, splits, pictures, kind.texts_apart)
        ],
    }
    if sheet:
        write_sheet(kind, splits, root, sheet, max_pixels, seed)
        report["sheet"] = str(sheet)
    return report, as_text(report)


def read_pictures(samples: Samples, index: PictureIndex) -> dict[str, Picture]:
    """path → what is there."""
    sizes = {sample.image: getattr(sample, "size", None) for sample in samples}
    known = index.find(list(sizes))
    return dict(ahead(lambda path: (path, read_picture(path, sizes[path], index, known.get(path))), sizes))


def read_picture(path: str, size: Size | None, index: PictureIndex, known: Facts | None) -> Picture:
    """The picture as it is; ``known``: what the index said of it."""
    try:
        decoded = index.read(path)
    except DataError as error:
        return Picture(error=str(error), unlike_index=known is not None)
    image = decoded.upright()
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    unlike = known is not None and known.digest != decoded.digest
    return Picture(digest, "", *fit(decoded, size, index.max_pixels), unlike)


def fit(picture: Decoded, size: Size | None, max_pixels: int) -> tuple[str, str]:
    """Misfit and note of a picture and its annotation's ``size``."""
    try:
        return "", picture.annotated(size, max_pixels).note if size else ""
    except DataError as error:
        return str(error), ""


# one split


def describe(kind: Any, samples: Samples, pictures: Mapping[str, Picture]) -> dict[str, Any]:
    broken = {path: picture.error for path, picture in pictures.items() if picture.error}
    details = kind.describe(samples)
    if unlike := [path for path, picture in pictures.items() if picture.unlike_index]:
        details["changed_without_a_new_time"] = len(unlike)
        details["changed_without_a_new_time_examples"] = unlike[:EXAMPLES]
    if hasattr(samples[0], "size"):  # the picture that the annotation was made on
        misfits = {path: picture.misfit for path, picture in pictures.items() if picture.misfit}
        details["wrong_sizes"] = len(misfits)
        details["wrong_size_examples"] = dict(list(misfits.items())[:EXAMPLES])
        details["read"] = dict(Counter(picture.note for picture in pictures.values() if picture.note))
    return {
        "samples": len(samples),
        "pictures": len(pictures),
        "broken_pictures": len(broken),
        "broken_examples": dict(list(broken.items())[:EXAMPLES]),
        **details,
    }


# two splits


def compare(
    one: str, other: str, splits: Mapping[str, Samples], pictures: Mapping[str, Mapping[str, Picture]], text: str
) -> list[dict[str, Any]]:
    """What two splits have in common, of what they had better not; ``text``: the samples' field of it, if any."""
    checks: dict[str, Callable[[str], set]] = {
        "id": lambda split: {sample.id for sample in splits[split]},
        "picture": lambda split: set(pictures[split]),
        "pixels": lambda split: {picture.digest for picture in pictures[split].values()} - {""},
        "object": lambda split: {sample.object for sample in splits[split]} - {""},
    }
    if text:
        checks[text] = lambda split: {getattr(sample, text) for sample in splits[split]} - {""}
    overlaps = []
    for what, values in checks.items():
        mine, yours = values(one), values(other)
        both = sorted(mine & yours)
        if both:
            share = round(len(both) / len(yours), 4)
            overlaps.append({"splits": [one, other], "what": what, "count": len(both), "share": share})
            overlaps[-1]["examples"] = examples(what, both, pictures[other])
    return overlaps


def examples(what: str, both: Sequence[str], pictures: Mapping[str, Picture]) -> list[str]:
    if what == "pixels":
        return [path for path, picture in pictures.items() if picture.digest in set(both)][:EXAMPLES]
    return [value[:LONGEST] for value in both[:EXAMPLES]]


def as_text(report: Mapping[str, Any]) -> str:
    """The report in lines for people."""
    lines = []
    for split, facts in report["splits"].items():
        lines.append(f"{split}:")
        lines += [f"  {key}: {value if isinstance(value, int) else json.dumps(value)}" for key, value in facts.items()]
    for overlap in report["shared"]:
        one, other = overlap["splits"]
        share = f"{overlap['count']} ({100 * overlap['share']:.1f} % of {other})"
        lines.append(
            f"{one} and {other} share the same {overlap['what']}: {share}, e.g. {', '.join(overlap['examples'])}"
        )
    if not report["shared"]:
        lines.append("no two splits share an id, a picture, its pixels or an object")
    if report.get("sheet"):
        lines.append(f"samples to look at: {report['sheet']}")
    return "\n".join(lines)


# the sheet


def write_sheet(kind: Any, splits: Mapping[str, Samples], root: Path, path: Path, max_pixels: int, seed: int) -> None:
    """A PNG with a row of samples drawn from each split: pictures with question and answer, or mask and expression."""
    rows = [row_of(kind, split, samples, root, max_pixels, seed) for split, samples in splits.items()]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * row.height))
    buffer = BytesIO()
    sheet.save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def row_of(kind: Any, split: str, samples: Samples, root: Path, max_pixels: int, seed: int) -> Image.Image:
    chosen = Random(f"{seed} {split}").sample(list(samples), min(COLUMNS, len(samples)))
    row = Image.new("RGB", (COLUMNS * (THUMBNAIL + 8), THUMBNAIL + 14 * LINES + 8), "white")
    draw = ImageDraw.Draw(row)
    for number, sample in enumerate(chosen):
        left = number * (THUMBNAIL + 8) + 4
        try:
            picture = shown(sample, root, max_pixels)
            scale = THUMBNAIL / max(picture.size)
            row.paste(picture.resize([max(1, round(scale * side)) for side in picture.size]), (left, 4))
            text = kind.caption(sample)
        except DataError as error:
            text = str(error)
        for line, words in enumerate(wrapped(f"{split}: {text}", draw)[:LINES]):
            draw.text((left, THUMBNAIL + 6 + 14 * line), words, fill="black")
    return row


def shown(sample: Any, root: Path, max_pixels: int) -> Image.Image:
    """The sample's picture, the target's mask in red."""
    if not hasattr(sample, "mask"):
        return open_image(root, sample.image, max_pixels)
    pixels, mask = np.array(annotated_image(root, sample.image, sample.size, max_pixels)), sample.mask()
    pixels[mask] = (pixels[mask] + RED) // 2
    return Image.fromarray(pixels)


def wrapped(text: str, draw: ImageDraw.ImageDraw) -> list[str]:
    """Lines that fit under a thumbnail: the first, of a long text."""
    lines = [""]
    for word in text[: LINES * LONGEST].encode("latin-1", "replace").decode("latin-1").split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= THUMBNAIL:
            lines[-1] = longer
        elif len(lines) < LINES:
            lines.append(word)
        else:
            break
    return lines
