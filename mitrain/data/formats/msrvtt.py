"""Captions of videos in MSR-VTT's own files (Xu et al. 2016).

``*videodatainfo*.json`` or ``MSRVTT*data*.json``, one or several: ``{"videos": [{"video_id", "split": train | validate |
test, "category"}], "sentences": [{"video_id", "sen_id", "caption"}]}``; the videos ``VIDEO_ID.mp4`` lie in ``videos/``,
``videos/all/``, ``TrainValVideo/`` or ``TestVideo/``.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.captions import FIRST, CaptionSample, image_folder, with_captions
from mitrain.data.formats.labels import counted
from mitrain.data.formats.references import field, id_of
from mitrain.data.formats.rows import list_in, read_table, unique

SPLITS = {"train": "train", "val": "validate", "test": "test"}
PATTERNS = ("*videodatainfo*.json", "MSRVTT*data*.json")
FOLDERS = ("videos/all", "videos", "all", "TrainValVideo", "TestVideo", "")


def read_msrvtt(root: Path, split: str, inputs: Sequence[str], videos: str | None = None) -> Sequence[CaptionSample]:
    """A split's captions in the files' order; each of the ``inputs`` is the video's file, wordless captions are left out and
    counted. Raises DataError naming file and sentence."""
    if split not in SPLITS:
        raise DataError(f"MSR-VTT has no split {split!r}: choose one of {', '.join(SPLITS)}")
    tables, left_out = tables_in(Path(root)), Counter()
    chosen = [name for path, table in tables for name, part in videos_in(path, table) if part == SPLITS[split]]
    if not chosen:
        raise DataError(f"{str(root)!r} has no video of the split {split!r} in its files: get the original ones")
    folder = image_folder(Path(root), [f"{name}.mp4" for name in chosen[:FIRST]], videos, FOLDERS, "videos")
    files = {name: dict.fromkeys(inputs, f"{folder}{name}.mp4") for name in chosen}
    samples = unique(one for path, table in tables for one in sentences_in(path, table, files, left_out))
    nothing = f"{str(root)!r} has no caption in the split {split!r}: get the original files"
    return with_captions(counted(samples, left_out, f"{root}: {split}", nothing))


def tables_in(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted(path for pattern in PATTERNS for path in root.glob(pattern))
    if not paths:
        raise DataError(f"no file {' or '.join(PATTERNS)} in {str(root)!r}: put MSR-VTT's there")
    return [(path, read_table(path)) for path in paths]


def videos_in(path: Path, table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each video's name and split."""
    for n, one in enumerate(list_in(path, "videos", table)):
        where = f"{path}: video {n}"
        yield id_of(one, "video_id", where), field(one, "split", str, where)


def sentences_in(
    path: Path, table: dict[str, Any], files: dict[str, dict[str, str]], left_out: Counter
) -> Iterator[tuple[str, CaptionSample]]:
    for n, one in enumerate(list_in(path, "sentences", table)):
        where = f"{path}: sentence {n}"
        video, number = id_of(one, "video_id", where), id_of(one, "sen_id", where)
        text = " ".join(field(one, "caption", str, where).split())
        if video not in files:  # of another split
            continue
        if not text:
            left_out["wordless captions"] += 1
            continue
        yield where, CaptionSample(f"{video}/{number}", files[video], text, video)


def splits_in(root: Path) -> list[str]:
    there = {part for path, table in tables_in(root) for _, part in videos_in(path, table)}
    return [split for split, name in SPLITS.items() if name in there]
