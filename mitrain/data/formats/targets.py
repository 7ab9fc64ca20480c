"""Files with a text and a number, from JSONL or CSV: a user's own columns by name.

JSONL: ``{"image": "a.jpg", "text": "not bad at all", "target": 1.5}``; ``id``, ``object`` and ``kind`` are optional and
other keys are ignored. CSV: the same by its header.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.alike import Alike, clean
from mitrain.data.formats.manifest import Manifest, Row
from mitrain.data.formats.rows import as_text, check_columns, inputs_of
from mitrain.data.samples import Sample

FIELDS = ("text", "target", "id", "object", "kind")
LARGEST = 1e15


@dataclass(frozen=True)
class TargetSample(Sample):
    """Files and a text, and the number that all together have. ``object`` names what must not be shared by splits."""

    text: str
    target: float
    object: str = ""
    kind: str = ""


def read_targets(
    source: Path | Manifest,
    columns: Mapping[str, str] | None = None,
    inputs: Sequence[str] = ("image",),
    may_lack: Collection[str] = (),
) -> list[TargetSample]:
    """Every record of a file (`Manifest`); ``columns`` maps our fields to the file's names.
    ``inputs``: the columns that name files, of which samples ``may_lack`` some.

    Raises DataError with the file and line of the first thing that is wrong.
    """
    source, columns = Manifest.of(source), check_columns(columns or {}, (*inputs, *FIELDS))
    own = {**dict.fromkeys(("text", "object", "kind"), clean), "target": numbers}
    return Alike(lambda rows: placed(rows, columns, inputs, may_lack), columns, inputs, own).samples(source, ("target",))


def placed(
    rows: Iterable[Row], columns: Mapping[str, str], inputs: Sequence[str], may_lack: Collection[str]
) -> Iterator[tuple[str, TargetSample]]:
    """Every record with its place, FILE:LINE."""
    for where, name, row in rows:
        texts = {field: as_text(row.get(columns[field]), columns[field], where) for field in FIELDS}
        there = inputs_of(row, columns, inputs, may_lack, where)
        if not texts["target"]:
            raise DataError(f"{where}: no {columns['target']!r}: fill it in, or map another with columns.target=NAME")
        target = number(texts["target"], columns["target"], where)
        yield (where, TargetSample(inputs=there, **texts | {"id": texts["id"] or name, "target": target}))


def numbers(cells: Sequence[Any]) -> Sequence[float] | None:
    """The numbers of cells that nothing is wrong with; else None."""
    if all(type(cell) in (int, float) and abs(cell) < LARGEST for cell in cells):
        return [float(cell) for cell in cells]
    texts = clean(cells)
    with suppress(DataError):
        return texts and [number(text, "", "") for text in texts]
    return None


def number(text: str, name: str, where: str) -> float:
    """The finite number that ``text`` of the column ``name`` writes."""
    try:
        value = float(text if text.isascii() and "_" not in text else "")
    except ValueError:
        raise DataError(f"{where}: {name!r} is {text[:40]!r}, no number: write it as 0.5 or -2") from None
    if not abs(value) < LARGEST:  # also NaN
        raise DataError(f"{where}: {name!r} is {text[:40]!r}: give a finite number below 10^15")
    return value
