"""Validation and test samples drawn from the training table of somebody who has but one, so that nothing leaks.

What shares an object, a file, a file's content or nearly a picture stays together; each label gives its share.
"""

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mitrain.core import parsing
from mitrain.core.errors import DataError
from mitrain.core.files import cache_home, file_lock, sha256_file, write_json
from mitrain.data.columns import column, take
from mitrain.data.contents import ADDRESS, read_content
from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain.data.formats.manifest import Manifest
from mitrain.data.images import open_image
from mitrain.data.index import ahead

MOST_PICTURES = 20_000  # that are compared with one another; the time grows with the square
MOST_TOGETHER = 0.5  # of the samples; a larger group means that pictures look too much alike to be told apart so

log = logging.getLogger(__name__)


def drawn(
    samples: Sequence[Any], shares: Mapping[str, float], seed: int, table: Manifest, files: Sequence[Path] | None = None
) -> dict[str, Sequence[Any]]:
    """``samples`` of ``table`` by split: ``shares`` of them in each of its splits, the rest in "train". ``files``: what says
    which samples there are, where it is not the table's.

    Deterministic in the table and the seed. Pictures are read once; which sample belongs where is then kept in the cache.
    Raises DataError where a split would be empty.
    """
    root = Path(table.root)
    asked = [
        *map(sha256_file, table.files() if files is None else files),
        str(root.resolve()),
        dict(shares),
        seed,
        [sample.id for sample in samples],
    ]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    kept = cache_home() / "splits" / f"{key}.json"
    with file_lock(kept.with_suffix(".lock")):
        held = None
        with suppress(OSError, parsing.Unreadable):
            held = parsing.read_json(kept)
        if not isinstance(held, dict) or set(held) != {sample.id for sample in samples}:
            held = draw(samples, shares, seed, root, str(table))
            write_json(kept, held)
    parts: dict[str, list[int]] = {split: [] for split in ("train", *shares)}
    for number, name in enumerate(column(samples, "id")):
        parts[held[name]].append(number)
    return {split: take(samples, numbers) for split, numbers in parts.items()}


def draw(samples: Sequence[Any], shares: Mapping[str, float], seed: int, root: Path, table: str) -> dict[str, str]:
    """The split of each sample, by its id."""
    groups = together(samples, root, table)
    members = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    strata = defaultdict(list)  # of groups, so that every label is in training and gives its share
    for group in sorted(members, key=lambda group: shuffled(samples[group].id, seed)):
        strata[getattr(samples[group], "labels", ())].append(group)
    chosen = ["train"] * len(samples)
    for own in strata.values():
        free, size = own[:-1], sum(len(members[group]) for group in own)
        for split, share in shares.items():
            wanted = share * size
            while free and wanted >= len(members[free[0]]) / 2:
                group = free.pop(0)
                wanted -= len(members[group])
                for number in members[group]:
                    chosen[number] = split
    keep_labels(samples, groups, chosen)
    counts = Counter(chosen)
    if empty := [split for split in ("train", *shares) if not counts[split]]:
        raise DataError(
            f"{table}: no sample is left for the split {empty[0]!r} of {len(members)} groups of samples that must stay"
            " together: give files of your own for each split, or larger shares"
        )
    joined = len(samples) - len(members)
    log.warning(
        "%s: drew %s%s", table, ", ".join(f"{counts[split]} for {split}" for split in ("train", *shares)),
        f"; {joined} samples stay with another that shares its object, its file or nearly its picture" if joined else "",
    )  # fmt: skip
    return {sample.id: split for sample, split in zip(samples, chosen, strict=True)}


def shuffled(name: str, seed: int) -> bytes:
    """Where a group stands in a random order in which a new group moves no other."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def keep_labels(samples: Sequence[Any], groups: Sequence[int], chosen: list[str]) -> None:
    """Take back into training each group with a label that training would else not have."""
    for split in {*chosen} - {"train"}:
        known = {label for s, c in zip(samples, chosen, strict=True) if c == "train" for label in getattr(s, "labels", ())}
        back = {
            group
            for sample, group, own in zip(samples, groups, chosen, strict=True)
            if own == split and not known.issuperset(getattr(sample, "labels", ()))
        }
        for number, group in enumerate(groups):
            if group in back:
                chosen[number] = "train"


def together(samples: Sequence[Any], root: Path, table: str) -> list[int]:
    """The group of each sample, as its first member's number: what must not be parted."""
    files = files_of(samples)
    contents = {path: same for own in files.values() for path, same in alike(root, sorted({*own} - {""})).items()}
    keys = [objects_of(samples), *([contents.get(path, path) for path in own] for own in files.values())]
    certain = merged(len(samples), (), *keys)
    pairs = near(samples, files, root, table)
    groups = merged(len(samples), pairs, *keys)
    if pairs and max(Counter(groups).values()) > max(MOST_TOGETHER * len(samples), max(Counter(certain).values())):
        log.warning("%s: its pictures look too much alike to tell near-duplicates from others: only the same file"
                    " and object keep samples together", table)  # fmt: skip
        return certain
    return groups


def related(samples: Sequence[Any]) -> list[int]:
    """The group of each sample, as its first member's number: those that share an object or a file, by their names."""
    return merged(len(samples), (), objects_of(samples), *files_of(samples).values())


def objects_of(samples: Sequence[Any]) -> list[str]:
    return [getattr(sample, "object", "") for sample in samples]


def files_of(samples: Sequence[Any]) -> dict[str, list[str]]:
    """By the name of an input, each sample's file, or an empty path."""
    names = sorted({name for sample in samples for name in sample.inputs})
    return {name: [sample.inputs.get(name, "") for sample in samples] for name in names}


def alike(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """A name for the content of each file that has another's size; only these are read."""
    sizes: dict[int, list[str]] = defaultdict(list)
    cells: dict[str, str] = {}
    for path in paths:
        if ADDRESS.fullmatch(path):
            with suppress(DataError):
                cells[path] = hashlib.sha256(read_content(root, path)[0]).hexdigest()
            continue
        with suppress(OSError, ValueError):  # reading it later says what is wrong
            sizes[os.stat(root / path).st_size].append(path)
    several = [path for own in sizes.values() if len(own) > 1 for path in own]
    return {path: sha256_file(root / path) for path in several} | cells


def near(samples: Sequence[Any], files: Mapping[str, Sequence[str]], root: Path, table: str) -> list[tuple[int, int]]:
    """Pairs of samples with nearly the same picture."""
    first: dict[str, int] = {}
    for own in files.values():
        for number, path in enumerate(own):
            if Path(path).suffix.lower() in Image.registered_extensions() or ADDRESS.fullmatch(path):
                first.setdefault(path, number)
    if len(first) > MOST_PICTURES:
        log.warning("%s: names more than %d pictures: near-duplicates are not looked for", table, MOST_PICTURES)
        return []
    prints = {path: seen for path, seen in ahead(lambda path: (path, seen_in(root, path)), first) if seen is not None}
    numbers = [first[path] for path in prints]
    found = near_pairs(np.stack(list(prints.values()))) if prints else []
    return [(numbers[i], numbers[j]) for i, j in found]


def seen_in(root: Path, path: str) -> np.ndarray | None:
    """The picture's fingerprint; None of a broken one (whoever reads it counts it) and of a plain one."""
    try:
        values = fingerprint(open_image(root, path))
    except DataError:
        return None
    return values if values.any() else None
