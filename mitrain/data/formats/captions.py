"""Pictures with captions for retrieval: Karpathy's JSON of COCO and Flickr30k, or JSONL and CSV of one's own.

Karpathy: ``{"dataset": …, "images": [{"imgid", "filename", "filepath" (COCO alone), "split": train | restval | val | test,
"sentences": [{"raw", "tokens", "sentid"}]}]}``; restval counts as train. One's own: columns image and text, an image on as
many lines as it has captions (in JSONL ``text`` may be a list); ``id`` and ``object`` are optional.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.columns import Columns
from mitrain.data.formats.alike import Alike, clean, filled
from mitrain.data.formats.labels import counted
from mitrain.data.formats.manifest import Manifest, Row
from mitrain.data.formats.references import field, once
from mitrain.data.formats.rows import MISSING, as_text, check_columns, check_meant, inputs_of, list_in, listed, unique
from mitrain.data.samples import Sample

REQUIRED = ("text",)
FIELDS = (*REQUIRED, "id", "object")
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
FOLDERS = ("", "images", "flickr30k_images", "flickr30k-images", "Images")
FIRST = 20  # pictures that the folder is looked for with


@dataclass(frozen=True)
class CaptionSample(Sample):
    """Files, of a picture or another modality, and one of their ``captions`` in the split. ``object`` names what must not be
    shared by splits."""

    text: str
    object: str = ""
    captions: tuple[str, ...] = dataclasses.field(default=(), compare=False)


def read_captions(
    source: Path | Manifest,
    columns: Mapping[str, str] | None = None,
    missing: Collection[str] = MISSING,
    inputs: Sequence[str] = ("image",),
    has_texts: bool = True,
) -> Sequence[CaptionSample]:
    """Every caption of a file (`Manifest`); none is of the words ``missing``. ``inputs``: the columns
    that name files; without texts that is all there is.

    Raises DataError with file and line.
    """
    source, columns = Manifest.of(source), check_columns(columns or {}, (*inputs, *FIELDS))
    words = (columns, missing, inputs, has_texts)
    own = {"text": partial(single, refused=missing) if has_texts else lambda cells: [""] * len(cells), "object": clean}
    alike = Alike(lambda rows: placed(rows, *words), columns, inputs, own)
    return with_captions(alike.samples(source, REQUIRED if has_texts else ()))


def single(cells: Sequence[Any], refused: Collection[str]) -> Sequence[str] | None:
    """`filled`, of cells that hold one text each."""
    texts = filled(cells, refused)
    return None if texts is None or not {cell[:1] for cell in cells}.isdisjoint("[({") else texts


def placed(
    rows: Iterable[Row], columns: Mapping[str, str], missing: Collection[str], inputs: Sequence[str], has_texts: bool
) -> Iterator[tuple[str, CaptionSample]]:
    """Every caption with its place, FILE:LINE."""
    for where, place, row in rows:
        files = inputs_of(row, columns, inputs, (), where)
        name, thing = (as_text(row.get(columns[f]), columns[f], where) for f in ("id", "object"))
        if not has_texts:
            yield where, CaptionSample(name or place, files, "", thing)
            continue
        given = listed(row.get(columns["text"]))
        texts = [as_text(t, columns["text"], where) for t in (given if isinstance(given, list) else [given])]
        if not (texts and all(texts)):
            raise DataError(f"{where}: no {columns['text']!r}: fill it in, or map another with columns.text=NAME")
        name = name or place
        for number, text in enumerate(texts):
            check_meant(text, columns["text"], where, missing)
            yield where, CaptionSample(f"{name}/{number}" if len(texts) > 1 else name, files, text, thing)


def with_captions(samples: Sequence[CaptionSample]) -> Sequence[CaptionSample]:
    """The samples with all captions of their pictures: a part of them is scored against all, too."""
    if isinstance(samples, Columns):
        return samples.grouped("captions", "text")
    texts: dict[tuple[str, ...], list[str]] = {}
    for sample in samples:
        texts.setdefault(tuple(sample.inputs.values()), []).append(sample.text)
    shared = {files: tuple(several) for files, several in texts.items()}
    return [replace(sample, captions=shared[tuple(sample.inputs.values())]) for sample in samples]


def read_karpathy(root: Path, file: str | None, split: str, images: str | None = None) -> Sequence[CaptionSample]:
    """A split's captions in the file's order. Raises DataError naming the file and the image's number in it.

    ``file`` may be left out where there is one ``dataset*.json``; ``images`` is the pictures' folder where it is not a
    usual one.
    """
    if split not in SPLITS:
        raise DataError(f"Karpathy's files have no split {split!r}: choose one of {', '.join(SPLITS)}")
    path = karpathy_file(Path(root), file)
    chosen = [image for image in read_images(path) if image[0] in SPLITS[split]]
    if not chosen:
        raise DataError(f"{str(path)!r} has no image in the split {split!r}: get the original file")
    folder = image_folder(Path(root), [picture for _, picture, _, _ in chosen[:FIRST]], images)
    left_out: Counter[str] = Counter()
    samples: list[tuple[str, CaptionSample]] = []
    for number, (_, picture, thing, sentences) in enumerate(chosen):
        left_out.update(["wordless captions"] * sum(not text for _, text in sentences))
        captions = [CaptionSample(name, {"image": f"{folder}{picture}"}, text, thing) for name, text in sentences if text]
        left_out.update([] if captions else ["images without a caption"])
        samples += [(f"{path}: image {number} of {split}", sample) for sample in captions]
    nothing = f"{str(path)!r} has no caption in the split {split!r}: get the original file"
    return with_captions(counted(unique(iter(samples)), left_out, f"{path}: {split}", nothing))


def karpathy_splits(root: Path, file: str | None) -> list[str]:
    there = {image[0] for image in read_images(karpathy_file(Path(root), file))}
    return [split for split, names in SPLITS.items() if there & set(names)] or list(SPLITS)


def karpathy_file(root: Path, file: str | None) -> Path:
    if file:
        return root / file
    there = sorted(root.glob("dataset*.json"))
    if len(there) != 1:
        names = ", ".join(path.name for path in there) or "none"
        raise DataError(f"{len(there)} files dataset*.json in {str(root)!r} ({names}): choose one with data.file=NAME")
    return there[0]


Image = tuple[str, str, str, list[tuple[str, str]]]  # split, path, object, captions with their ids


@once
def read_images(path: Path) -> list[Image]:
    return [read_image(image, n, f"{path}: image {n}") for n, image in enumerate(list_in(path, "images"))]


def read_image(image: Any, number: int, where: str) -> Image:
    split, name = (field(image, key, str, where) for key in ("split", "filename"))
    if not name:
        raise DataError(f"{where} has no 'filename': get the original file")
    if split not in {s for names in SPLITS.values() for s in names}:
        raise DataError(f"{where} has the unknown split {split[:40]!r}: get the original file")
    folder, thing = (field({key: "", **image}, key, str, where) for key in ("filepath", "object"))
    sentences = enumerate(field(image, "sentences", list, where))
    captions = [(f"{number}/{i}", caption(s, f"{where}, sentence {i}")) for i, s in sentences]
    return split, f"{folder}/{name}" if folder else name, thing, captions


def caption(sentence: Any, where: str) -> str:
    """The raw caption, or its tokens where the file has those alone."""
    if isinstance(sentence, dict) and isinstance(tokens := sentence.get("tokens"), list) and "raw" not in sentence:
        sentence = {"raw": " ".join(field({"token": token}, "token", str, where) for token in tokens)}
    return " ".join(field(sentence, "raw", str, where).split())


def image_folder(
    root: Path, first: list[str], images: str | None, usual: Sequence[str] = FOLDERS, setting: str = "images"
) -> str:
    """The pictures' folder below ``root``, with a slash at its end: where one of the ``first`` pictures lies. ``images``:
    what ``setting`` says, which names it where it is none of the ``usual`` ones."""
    for folder in (images,) if images is not None else usual:
        prefix = f"{folder.rstrip('/')}/" if folder.strip("./") else ""
        if any((root / prefix / picture).is_file() for picture in first):
            return prefix
    tried = images or " or ".join(f"{folder}/" for folder in usual if folder)
    raise DataError(f"no file {first[0][:200]!r} in {str(root)!r}, nor in its {tried}: set data.{setting} to their folder")
