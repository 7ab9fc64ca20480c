"""Files with a text and one or several labels, from JSONL or CSV: a user's own columns by name.

JSONL: ``{"image": "a.jpg", "text": "a red apple", "label": "food"}``, or a list of labels where samples have several;
``id``, ``object`` and ``kind`` are optional and other keys are ignored. CSV: the same by its header, several labels
separated by ``|`` (or what is said).
"""

import logging
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mitrain.core.config import nearest
from mitrain.core.errors import DataError
from mitrain.data.columns import different
from mitrain.data.formats.alike import Alike, clean
from mitrain.data.formats.manifest import Manifest, Row
from mitrain.data.formats.rows import MISSING, as_text, check_columns, check_meant, inputs_of, listed, split_cell
from mitrain.data.samples import Sample

FIELDS = ("text", "label", "id", "object", "kind")
BITS = {"0", "1", "0.0", "1.0", "0.", "1."}
"""What a one-hot vector is made of."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelSample(Sample):
    """Files and a text, and the labels that all together have. ``object`` names what must not be shared by splits."""

    text: str
    labels: tuple[str, ...]
    object: str = ""
    kind: str = ""


def read_labels(
    source: Path | Manifest,
    columns: Mapping[str, str] | None = None,
    multilabel: bool = False,
    separator: str = "|",
    known: Collection[str] = (),
    missing: Collection[str] = MISSING,
    inputs: Sequence[str] = ("image",),
    may_lack: Collection[str] = (),
) -> list[LabelSample]:
    """Every record of a file (`Manifest`).

    ``columns`` maps our fields to the file's names where they differ. With ``multilabel`` a label is a list, or a text
    split at ``separator``, and may be empty; without, there is exactly one. Where classes are ``known``, others are
    refused; where not, a label is none of the words ``missing``. ``inputs``: the columns that name files, of which samples
    ``may_lack`` some.
    Raises DataError with the file and line of the first thing that is wrong.
    """
    source, columns = Manifest.of(source), check_columns(columns or {}, (*inputs, *FIELDS))
    read = several_labels if multilabel else one_label
    files = partial(inputs_of, columns=columns, inputs=inputs, may_lack=may_lack)
    words = (columns, read, separator, frozenset(known), () if known else missing, files)
    own = dict.fromkeys(("text", "object", "kind"), clean)
    samples = Alike(lambda rows: placed(rows, *words), columns, inputs, own).samples(source, ("label",))
    if len(samples) > 1 and all(len(one) == 2 and set(one) <= BITS for one in different(samples, "labels")):
        raise DataError(
            f"{str(source)!r}: every {columns['label']!r} is a vector of a zero and a one: give the names of the labels"
            " instead"
        )
    return samples


def placed(
    rows: Iterable[Row],
    columns: Mapping[str, str],
    read: Callable[..., tuple[str, ...]],
    separator: str,
    known: frozenset[str],
    missing: Collection[str],
    files: Callable[..., dict[str, str]],
) -> Iterator[tuple[str, LabelSample]]:
    """Every record with its place, FILE:LINE."""
    for where, name, row in rows:
        texts = {f: as_text(row.get(columns[f]), columns[f], where) for f in FIELDS if f != "label"}
        there = files(row, where=where)
        if columns["label"] not in row:
            raise DataError(f"{where}: no {columns['label']!r}: add it, or map another with columns.label=NAME")
        labels = check_known(read(row[columns["label"]], columns["label"], where, separator), known, where)
        for label in labels:
            check_meant(label, columns["label"], where, missing)
        yield where, LabelSample(**texts | {"id": texts["id"] or name}, inputs=there, labels=labels)


def one_label(value: Any, name: str, where: str, _separator: str) -> tuple[str, ...]:
    if isinstance(listed(value), list):
        raise DataError(f"{where}: {name!r} is a list: give one label, or set data.multilabel=true")
    label = as_text(value, name, where)
    if not label:
        raise DataError(f"{where}: {name!r} is empty: give one label")
    return (label,)


def several_labels(value: Any, name: str, where: str, separator: str) -> tuple[str, ...]:
    """Labels in their order, each once; a cell may hold them as a list, too."""
    value = [] if value is None else split_cell(listed(value), separator)
    labels = [as_text(v, name, where) for v in (value if isinstance(value, list) else [value])]
    if not all(labels):
        raise DataError(f"{where}: {name!r} holds an empty label: remove it")
    if len(set(labels)) < len(labels) and set(labels) <= BITS:
        raise DataError(
            f"{where}: {name!r} is a vector of zeros and ones, {str(value)[:60]}: give the names of the labels instead"
        )
    return tuple(dict.fromkeys(labels))


def class_names(samples: Sequence[LabelSample], where: str) -> tuple[str, ...]:
    """The labels that samples have, in alphabetical order. DataError where they are fewer than two."""
    names = tuple(sorted({label for labels in different(samples, "labels") for label in labels}))
    if len(names) < 2:
        raise DataError(f"{where} has {len(names)} different label(s): a classification needs two or more")
    if all(len(set(labels)) == len(names) for labels in different(samples, "labels")):
        log.warning("%s gives every sample all %d labels: nothing tells them apart", where, len(names))
    for one, other in look_alikes(names):
        log.warning("%s has the labels %s and %s, which count as two", where, one, other)
    return names


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that a reader takes for one, written so that their difference can be seen."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(core(name), name), name) for name in names]
    return [(ascii(a), ascii(b)) if composed(a) == composed(b) else (repr(a), repr(b)) for a, b in pairs if a != b]


def core(name: str) -> str:
    """A name without letter case, invisible characters, and ways to compose letters or to write numbers."""
    seen = "".join(c for c in composed(name) if unicodedata.category(c) != "Cf").strip()
    try:
        return repr(float(seen))
    except ValueError:
        return " ".join(seen.casefold().split())


def composed(name: str) -> str:
    return unicodedata.normalize("NFKC", name)


def check_known(labels: Sequence[str], known: Collection[str], where: str) -> tuple[str, ...]:
    """The labels, if each is among the classes ``known`` (none known: all are)."""
    for label in labels if known else ():
        if label not in known:
            alike = sorted(name for name in known if core(name) == core(label))
            hint = f" (did you mean {alike[0]!r}?)" if alike else nearest(label, known)
            raise DataError(
                f"{where}: the label {label[:80]!r} is no class{hint}: correct it, or name all classes in data.classes"
            )
    return tuple(labels)


def counted(samples: Sequence[Any], left_out: Mapping[str, int], where: str, nothing: str) -> Sequence[Any]:
    """The samples, after a line that says how many were left out, by reason; DataError ``nothing`` where none remain."""
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        log.warning("%s: left out %s; %d samples remain", where, reasons, len(samples))
    if not samples:
        raise DataError(nothing)
    return samples
