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
from textwrap import wrap
from types import MappingProxyType
from typing import Any

from PIL import Image

from mitrain.core.errors import DataError
from mitrain.core.files import write_atomic
from mitrain.data import figures
from mitrain.data.images import Decoded, Facts, Size, annotated_image, open_image
from mitrain.data.index import FileIndex, ahead
from mitrain.data.media import MEDIA, Limits

EXAMPLES, LONGEST = 5, 200  # named of each kind of trouble; characters of a name
THUMBNAIL, COLUMNS, LINES, LETTERS = 176, 6, 4, 26  # of the sheet: pixels, samples of a split, lines under each, letters
USUAL = Limits()

Samples = Sequence[Any]


@dataclass(frozen=True)
class Seen:
    """A file: the ``digest`` of its content (of a picture, its pixels), or the ``error`` that stopped us from reading it.

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
    limits: Limits = USUAL,
    media: Mapping[str, str] = MappingProxyType({"image": "image"}),
    seed: int = 0,
    cache: Path | None = None,
) -> tuple[dict[str, Any], str]:
    """A report as JSON values and as text to print; ``sheet`` is where the PNG with samples is written.

    ``kind``: the task that the samples are for (a subclass of `mitrain.tasks.base.Task`), which describes them.
    ``root`` is the folder that the samples' files are in; ``media``: what the file of each input is, as in `MEDIA`. Reads
    every file once, and puts the index of ``cache`` right where it is not what is there.
    """
    folder = cache / "index" if cache else None
    indices = {name: FileIndex(root, folder, MEDIA[medium], limits) for name, medium in media.items()}
    seen = {
        split: {name: read_files(samples, name, index) for name, index in indices.items()}
        for split, samples in splits.items()
    }
    for index in indices.values():
        index.publish()
    report: dict[str, Any] = {
        "splits": {split: describe(kind, samples, seen[split]) for split, samples in splits.items()},
        "shared": [
            overlap
            for one, other in combinations(splits, 2)
            for overlap in compare(one, other, splits, seen, kind.texts_apart)
        ],
    }
    if sheet:
        pictures = sorted([n for n, medium in media.items() if medium == "image"], key=lambda name: name != "image")
        write_sheet(kind, splits, root, sheet, limits.pixels, seed, pictures)
        report["sheet"] = str(sheet)
    return report, as_text(report)


def read_files(samples: Samples, name: str, index: FileIndex) -> dict[str, Seen]:
    """path → what is there, of the input ``name``."""
    stated = name == "image"  # an annotation's size is of the picture that it was made on
    sizes = {s.inputs[name]: getattr(s, "size", None) if stated else None for s in samples if name in s.inputs}
    known = index.find(list(sizes))
    return dict(ahead(lambda path: (path, read_file(path, sizes[path], index, known.get(path))), sizes))


def read_file(path: str, size: Size | None, index: FileIndex, known: Facts | None) -> Seen:
    """The file as it is; ``known``: what the index said of it."""
    try:
        decoded = index.read(path)
    except DataError as error:
        return Seen(error=str(error), unlike_index=known is not None)
    content = decoded.content()
    digest = decoded.digest
    if isinstance(content, Image.Image):
        digest = hashlib.sha256(f"{content.size}".encode() + content.tobytes()).hexdigest()
    unlike = known is not None and known.digest != decoded.digest
    return Seen(digest, "", *fit(decoded, size, index.limits.pixels), unlike)


def fit(picture: Decoded, size: Size | None, max_pixels: int) -> tuple[str, str]:
    """Misfit and note of a picture and its annotation's ``size``."""
    try:
        return "", picture.annotated(size, max_pixels).note if size else ""
    except DataError as error:
        return str(error), ""


# one split


def describe(kind: Any, samples: Samples, seen: Mapping[str, Mapping[str, Seen]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"samples": len(samples)}
    for name, files in seen.items():
        called = "pictures" if name == "image" else f"{name}_files"
        broken = {path: file.error for path, file in files.items() if file.error}
        facts |= {called: len(files), f"broken_{called}": len(broken)}
        facts |= {f"broken_{name}_examples" if name != "image" else "broken_examples": dict(list(broken.items())[:EXAMPLES])}
        if lacking := sum(name not in sample.inputs for sample in samples):
            facts[f"samples_without_{name}"] = lacking
    details, every = kind.describe(samples), {path: file for files in seen.values() for path, file in files.items()}
    if unlike := [path for path, file in every.items() if file.unlike_index]:
        details["changed_without_a_new_time"] = len(unlike)
        details["changed_without_a_new_time_examples"] = unlike[:EXAMPLES]
    if hasattr(samples[0], "size"):  # the picture that the annotation was made on
        misfits = {path: file.misfit for path, file in every.items() if file.misfit}
        details["wrong_sizes"] = len(misfits)
        details["wrong_size_examples"] = dict(list(misfits.items())[:EXAMPLES])
        details["read"] = dict(Counter(file.note for file in every.values() if file.note))
    return facts | details


# two splits


def compare(
    one: str, other: str, splits: Mapping[str, Samples], seen: Mapping[str, Mapping[str, Mapping[str, Seen]]], text: str
) -> list[dict[str, Any]]:
    """What two splits have in common, of what they had better not; ``text``: the samples' field of it, if any."""
    checks: dict[str, tuple[str, Callable[[str], set]]] = {"id": ("", lambda split: {s.id for s in splits[split]})}
    for name in seen[one]:
        file, content = ("picture", "pixels") if name == "image" else (f"{name} file", f"{name} content")
        checks[file] = (name, lambda split, name=name: set(seen[split][name]))
        checks[content] = (name, lambda split, name=name: {file.digest for file in seen[split][name].values()} - {""})
    checks["object"] = ("", lambda split: {sample.object for sample in splits[split]} - {""})
    if text:
        checks[text] = ("", lambda split: {getattr(sample, text) for sample in splits[split]} - {""})
    overlaps = []
    for what, (name, values) in checks.items():
        mine, yours = values(one), values(other)
        both = sorted(mine & yours)
        if both:
            share = round(len(both) / len(yours), 4)
            overlaps.append({"splits": [one, other], "what": what, "count": len(both), "share": share})
            files = seen[other][name] if what == "pixels" or what.endswith(" content") else {}
            shown = [path for path, file in files.items() if file.digest in set(both)] or both
            overlaps[-1]["examples"] = [value[:LONGEST] for value in shown[:EXAMPLES]]
    return overlaps


def as_text(report: Mapping[str, Any]) -> str:
    lines = []
    for split, facts in report["splits"].items():
        lines.append(f"{split}:")
        lines += [f"  {key}: {value if isinstance(value, int) else json.dumps(value)}" for key, value in facts.items()]
    for overlap in report["shared"]:
        one, other = overlap["splits"]
        share = f"{overlap['count']} ({100 * overlap['share']:.1f} % of {other})"
        lines.append(f"{one} and {other} share the same {overlap['what']}: {share}, e.g. {', '.join(overlap['examples'])}")
    if not report["shared"]:
        lines.append("no two splits share an id, a file, its content or an object")
    if report.get("sheet"):
        lines.append(f"samples to look at: {report['sheet']}")
    return "\n".join(lines)


# the sheet


def write_sheet(
    kind: Any, splits: Mapping[str, Samples], root: Path, path: Path, max_pixels: int, seed: int, pictures: Sequence[str]
) -> None:
    """A PNG with samples drawn from each split: pictures with question and answer, or mask and expression; other files by
    their names. ``pictures``: the inputs that are such."""
    panels = [
        panel(kind, split, sample, root, max_pixels, pictures)
        for split, samples in splits.items()
        for sample in Random(f"{seed} {split}").sample(list(samples), min(COLUMNS, len(samples)))
    ]
    buffer = BytesIO()
    figures.sheet(panels, COLUMNS, THUMBNAIL).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def panel(kind: Any, split: str, sample: Any, root: Path, max_pixels: int, pictures: Sequence[str]) -> figures.Panel:
    seen = next((name for name in pictures if name in sample.inputs), "")
    try:
        picture, text = shown(sample, seen, root, max_pixels), kind.caption(sample)
        text = " | ".join([text, *(f"{name}: {path}" for name, path in sample.inputs.items() if name != seen)])
    except DataError as error:
        picture, text = figures.card([]), str(error)
    return figures.Panel(picture, wrap(f"{split}: {text[: LINES * LONGEST]}", LETTERS)[:LINES])


def shown(sample: Any, name: str, root: Path, max_pixels: int) -> Image.Image:
    """The sample's picture ``name``, the target's mask in red; white where it has none."""
    if not name:
        return figures.card([])
    if not hasattr(sample, "mask"):
        return open_image(root, sample.inputs[name], max_pixels)
    return figures.overlay(annotated_image(root, sample.inputs[name], sample.size, max_pixels), sample.mask())
