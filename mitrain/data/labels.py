"""Pictures with a text and one or several labels, from JSONL or CSV: a user's own columns by name.

JSONL: ``{"image": "a.jpg", "text": "a red apple", "label": "food"}``, or a list of labels where samples have several;
``id``, ``object`` and ``kind`` are optional and other keys are ignored. CSV: the same by its header, several labels
separated by ``|`` (or what is said).
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mitrain.config import nearest
from mitrain.data.rows import as_text, check_columns, read_rows, split_cell, unique
from mitrain.errors import DataError

REQUIRED = ("image", "label")
FIELDS = ("image", "text", "label", "id", "object", "kind")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelSample:
    """A picture (its path below the data's folder), a text and the labels that both together have.

    ``object`` names what must not be shared by splits.
    """

    id: str
    image: str
    text: str
    labels: tuple[str, ...]
    object: str = ""
    kind: str = ""

    def fault(self) -> str:
        """What is wrong with the sample beside its picture: nothing, or it would not have been read."""
        return ""


def read_labels(
    path: Path,
    columns: Mapping[str, str] | None = None,
    multilabel: bool = False,
    separator: str = "|",
    known: Collection[str] = (),
) -> list[LabelSample]:
    """Every record of a ``.jsonl``, ``.csv`` or ``.tsv`` file.

    ``columns`` maps our fields to the file's names where they differ. With ``multilabel`` a label is a list, or a text
    split at ``separator``, and may be empty; without, there is exactly one. Where classes are ``known``, others are
    refused. Raises DataError with the file and line of the first thing that is wrong.
    """
    path, columns = Path(path), check_columns(columns or {}, FIELDS)
    samples = unique(placed(path, columns, several_labels if multilabel else one_label, separator, frozenset(known)))
    if not samples:
        raise DataError(f"{str(path)!r} holds no records: give one JSON object or CSV row a line")
    return samples


def placed(
    path: Path, columns: Mapping[str, str], read: Callable[..., tuple[str, ...]], separator: str, known: frozenset[str]
) -> Iterator[tuple[str, LabelSample]]:
    """Every record with its place, FILE:LINE."""
    for line, row in read_rows(path, columns, REQUIRED):
        where = f"{path}:{line}"
        texts = {f: as_text(row.get(columns[f]), columns[f], where) for f in FIELDS if f != "label"}
        if not texts["image"]:
            raise DataError(f"{where}: no {columns['image']!r}: fill it in, or map another with columns.image=NAME")
        if columns["label"] not in row:
            raise DataError(f"{where}: no {columns['label']!r}: add it, or map another with columns.label=NAME")
        labels = check_known(read(row[columns["label"]], columns["label"], where, separator), known, where)
        yield where, LabelSample(**texts | {"id": texts["id"] or f"{path.name}:{line}"}, labels=labels)


def one_label(value: Any, name: str, where: str, _separator: str) -> tuple[str, ...]:
    if isinstance(value, list):
        raise DataError(f"{where}: {name!r} is a list: give one label, or set data.multilabel=true")
    label = as_text(value, name, where)
    if not label:
        raise DataError(f"{where}: {name!r} is empty: give one label")
    return (label,)


def several_labels(value: Any, name: str, where: str, separator: str) -> tuple[str, ...]:
    """Labels in their order, each once."""
    value = [] if value is None else split_cell(value, separator)
    found = [as_text(v, name, where) for v in (value if isinstance(value, list) else [value])]
    if not all(found):
        raise DataError(f"{where}: {name!r} holds an empty label: remove it")
    return tuple(dict.fromkeys(found))


def class_names(samples: Sequence[LabelSample], where: str) -> tuple[str, ...]:
    """The labels that samples have, in alphabetical order. DataError where they are fewer than two."""
    names = tuple(sorted({label for sample in samples for label in sample.labels}))
    if len(names) < 2:
        raise DataError(f"{where} has {len(names)} different label(s): a classification needs two or more")
    folded: dict[str, str] = {}
    for name in names:
        if name != folded.setdefault(name.casefold(), name):
            log.warning("%s has the labels %r and %r, which count as two", where, folded[name.casefold()], name)
    return names


def check_known(labels: Sequence[str], known: Collection[str], where: str) -> tuple[str, ...]:
    """The labels, if each is among the classes ``known`` (none known: all are)."""
    for label in labels if known else ():
        if label not in known:
            raise DataError(
                f"{where}: the label {label[:80]!r} is no class{nearest(label, known)}: correct it, or name all classes"
                " in data.classes"
            )
    return tuple(labels)


def report_left_out(samples: Sequence[LabelSample], left_out: Mapping[str, int], where: str) -> None:
    """Say how many samples were left out, by reason."""
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        log.warning("%s: left out %s; %d samples remain", where, reasons, len(samples))
