"""Clips with a sentiment in the files of MMSA: CMU-MOSI, CMU-MOSEI, CH-SIMS (Mao et al. 2022).

``label.csv`` with the columns video_id, clip_id, text, label (of SIMS also label_T, label_A, label_V), annotation and mode,
and the clips ``Raw/VIDEO_ID/CLIP_ID.mp4``. Or a pickle of features ``{train, valid, test: {"id", "raw_text",
"regression_labels", "annotations", "audio" (N, T, e), "vision" (N, T, e), "audio_lengths", "vision_lengths"}}``; aligned
files have no lengths, SIMS has labels of each modality, too (``regression_labels_A`` …). The arrays are read clip by clip
by `mitrain.data.arrays`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mitrain.core.errors import DataError
from mitrain.core.parsing import is_whole
from mitrain.data.arrays import opened_pickle
from mitrain.data.formats.manifest import read_rows
from mitrain.data.formats.rows import as_text, is_table, unique
from mitrain.data.formats.targets import LARGEST, TargetSample, number
from mitrain.data.tables import Refused, stamp

PARTS = {"train": "train", "val": "valid", "test": "test"}
REQUIRED = ("video_id", "clip_id", "text", "mode")
COLUMNS = (*REQUIRED, "annotation")
CLIP = "$_$"  # between a video's name and a clip's number
NAMES = {"video": "vision", "speech": "audio", "sound": "audio"}
"""What MMSA calls a modality, where it may be called otherwise here."""


def read_clips(root: Path, file: str, split: str, inputs: Sequence[str], labels: str, folder: str) -> list[TargetSample]:
    """A split's rows of a table in its order; each of the ``inputs`` is the clip below ``folder``; ``labels``: the numbers'
    column. Clips of one video are of one object. Raises DataError naming file and line.
    """
    path, name = Path(root) / file, PARTS.get(split, split)
    samples = unique(rows_of(path, name, inputs, labels, Path(root), folder))
    if not samples:
        raise DataError(f"{str(path)!r} has no row of the mode {name!r}: choose another split")
    return samples


def rows_of(
    path: Path, name: str, inputs: Sequence[str], labels: str, root: Path, folder: str
) -> Iterator[tuple[str, TargetSample]]:
    columns = {field: field for field in COLUMNS} | {"label": labels}
    for where, _, row in read_rows(path, columns, (*REQUIRED, "label")):
        texts = {field: as_text(row.get(column), column, where) for field, column in columns.items()}
        for field in (*REQUIRED[:2], "label", "mode"):
            if not texts[field]:
                raise DataError(f"{where}: no {columns[field]!r}: get the original file")
        if texts["mode"] != name:
            continue
        video, clip = texts["video_id"], texts["clip_id"]
        found = clip_file(root, f"{folder}/{video}", clip)
        target = number(texts["label"], labels, where)
        files = dict.fromkeys(inputs, found)
        yield where, TargetSample(f"{video}{CLIP}{clip}", files, texts["text"], target, video, texts["annotation"])


def clip_file(root: Path, folder: str, clip: str) -> str:
    """The clip's path below ``root``; spreadsheets take the zeros of 0001 away."""
    padded = f"{folder}/{clip.zfill(4)}.mp4"
    plain = f"{folder}/{clip}.mp4"
    return padded if not (root / plain).is_file() and (root / padded).is_file() else plain


def read_features(root: Path, file: str, split: str, inputs: Sequence[str], labels: str) -> list[TargetSample]:
    """A split's clips of a pickle in its order, with the arrays of ``inputs``; ``labels``: the numbers' name in the file.

    Clips of one video are of one object. Raises DataError naming file, split and clip.
    """
    path, name = Path(root) / file, PARTS.get(split, split)
    tree = tree_of(path)
    if not isinstance(tree.get(name), dict):
        raise DataError(f"{str(path)!r} has no part {name!r}, only {', '.join(map(str, tree))[:80]}: choose another split")
    part = tree[name]
    where = f"{path}: {name}"
    ids, texts = texts_in(part, "id", where), texts_in(part, "raw_text", where)
    kinds = texts_in(part, "annotations", where) if "annotations" in part else [""] * len(ids)
    targets = numbers_in(part, labels, where)
    keys = {one: NAMES.get(one, one) if one not in part else one for one in inputs}
    counts = {"raw_text": len(texts), labels: len(targets), "annotations": len(kinds)}
    counts |= {key: rows_in(part, key, where) for key in keys.values()}
    for key, count in counts.items():
        if count != len(ids):
            raise DataError(f"{where} has {len(ids)} clips and {count} in {key!r}: get the original file")
    clips: list[tuple[str, TargetSample]] = []
    for n, (clip, text, target, kind) in enumerate(zip(ids, texts, targets, kinds, strict=True)):
        places = {one: f"{file}#{name}/{key}/{n}" for one, key in keys.items()}
        clips.append((f"{where}: clip {n}", TargetSample(clip, places, text, target, clip.split(CLIP)[0], kind)))
    return unique(iter(clips))


def parts_in(root: Path, file: str) -> list[str]:
    """The splits that the table or the pickle has."""
    path = Path(root) / file
    if is_table(path):
        there = {row.cells.get("mode") for row in read_rows(path, {"mode": "mode"}, ("mode",))}
    else:
        there = set(tree_of(path))
    return [split for split, name in PARTS.items() if name in there]


def tree_of(path: Path) -> dict[str, Any]:
    try:
        return opened_pickle(path, stamp(path))
    except Refused as error:
        raise DataError(f"{str(path)!r} {error}: get the original file") from None
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error}): put the file there") from None


def value_of(part: dict[str, Any], key: str, where: str) -> Any:
    if key not in part:
        more = ": this is a file of features alone, as MulT's; get MMSA's" if key == "raw_text" else ""
        raise DataError(f"{where} has no {key!r}, only {', '.join(map(str, part))[:160]}{more}")
    return part[key]


def texts_in(part: dict[str, Any], key: str, where: str) -> list[str]:
    """A list or an array of texts (N,) or (N, 1)."""
    value = value_of(part, key, where)
    try:
        value = value.tolist() if isinstance(value, np.ndarray) else value
    except ValueError:  # no character has this number
        value = None
    if isinstance(value, list):
        value = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in value]
        value = [one.decode("utf-8", "replace") if isinstance(one, bytes) else one for one in value]
    if not isinstance(value, list) or not all(isinstance(one, str) and is_whole(one) for one in value):
        raise DataError(f"{where} has no list of texts {key!r}: get the original file")
    return [" ".join(one.split()) for one in value]


def numbers_in(part: dict[str, Any], key: str, where: str) -> list[float]:
    """(N,) or (N, 1, 1) finite numbers."""
    try:
        value = np.asarray(value_of(part, key, where), np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{where} has {key!r} that are no numbers: get the original file") from None
    if value.ndim < 1 or value.size != len(value):
        raise DataError(f"{where} has {key!r} of shape {value.shape}, not one number a clip: choose others")
    value = value.reshape(-1)
    if not (np.abs(value) < LARGEST).all():
        bad = int(np.argmin(np.abs(value) < LARGEST))
        raise DataError(f"{where}: clip {bad} has the label {value[bad]} in {key!r}: get the original file")
    return value.tolist()


def rows_in(part: dict[str, Any], key: str, where: str) -> int:
    value = value_of(part, key, where)
    if not isinstance(value, np.ndarray) or value.ndim != 3:
        raise DataError(f"{where} has no arrays (N, T, e) in {key!r}: read others")
    return len(value)
