"""SNLI-VE: does a picture (of Flickr30k) entail a sentence, contradict it, or neither?

``snli_ve_{train,dev,test}.jsonl``: ``gold_label``, ``sentence1`` (the caption that the picture stands for: not for the
model), ``sentence2`` (the hypothesis), ``pairID``, and the picture under one of the names that the files of different
years have: ``Flikr30kID`` (so misspelt by the generator), ``Flickr30kID`` or ``Flickr30K_ID`` (without ".jpg"); where none
is there, the part of ``pairID`` before ".jpg". Pictures lie in ``flickr30k_images/``.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.labels import LabelSample, check_known, counted
from mitrain.data.formats.manifest import read_rows
from mitrain.data.formats.rows import folder_in, unique

CLASSES = ("entailment", "neutral", "contradiction")
UNDECIDED = "-"  # the annotators' votes have no majority
SPLITS = {"train": "train", "val": "dev", "dev": "dev", "test": "test"}
IMAGE_KEYS = ("Flikr30kID", "Flickr30kID", "Flickr30K_ID")
SPELLINGS = ("flikr30kid", "flickr30kid")  # of any key in small letters, without underscores
FOLDERS = ("flickr30k_images", "flickr30k-images", "images")


def read_snli_ve(root: Path, split: str, images: str | None = None, known: Collection[str] = CLASSES) -> list[LabelSample]:
    """A split's hypotheses in the file's order; undecided ones are left out, and counted.

    ``images`` is the folder of the pictures where it is not a usual one; labels are among those ``known``. Raises
    DataError naming file and line.
    """
    if split not in SPLITS:
        raise DataError(f"SNLI-VE has no split {split!r}: choose one of {', '.join(SPLITS)}")
    path = Path(root) / file_of(split)
    left_out: Counter[str] = Counter()
    folder = folder_in(Path(root), (images,) if images else FOLDERS, "set data.images=FOLDER")
    samples = unique(hypotheses(path, folder, left_out, known))
    return counted(samples, left_out, str(path), f"{str(path)!r} holds no decided pair: get the original file")


def file_of(split: str) -> str:
    return f"snli_ve_{SPLITS[split]}.jsonl"


def hypotheses(path: Path, folder: str, left_out: Counter, known: Collection[str]) -> Iterator[tuple[str, LabelSample]]:
    for where, name, row in read_rows(path, {}, ()):
        label = text_at(row, "gold_label", where)
        if label == UNDECIDED:
            left_out["without a majority of votes"] += 1
            continue
        picture = picture_of(row, where)
        pair = text_at(row, "pairID", where) if "pairID" in row else name
        labels = check_known([label], known, where)
        text = text_at(row, "sentence2", where).strip()
        yield where, LabelSample(pair, {"image": f"{folder}/{picture}"}, text, labels, object=picture)


def picture_of(row: Mapping[str, Any], where: str) -> str:
    """The picture's file name."""
    named = [key for key in IMAGE_KEYS if key in row] or [k for k in row if k.replace("_", "").lower() in SPELLINGS]
    key = next((key for key in named if row[key] not in (None, "")), None)
    if key is None:
        pair = row.get("pairID")
        name, dot, _ = pair.partition(".jpg") if isinstance(pair, str) else ("", "", "")
        if not dot:
            raise DataError(f"{where}: no {', '.join(IMAGE_KEYS[:3])} and no picture in pairID: get the original file")
        return name + dot
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is a {type(value).__name__}: give the picture's name")
    return value if value.lower().endswith((".jpg", ".png")) else value + ".jpg"


def text_at(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: no {key!r}: get the original file")
    return value
