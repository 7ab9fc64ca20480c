"""Pictures with a text and a number, from JSONL or CSV: a user's own columns by name.

JSONL: ``{"image": "a.jpg", "text": "not bad at all", "target": 1.5}``; ``id``, ``object`` and ``kind`` are optional and
other keys are ignored. CSV: the same by its header.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mitrain.core.errors import DataError
from mitrain.data.formats.rows import as_text, check_columns, read_rows, unique

REQUIRED = ("image", "target")
FIELDS = ("image", "text", "target", "id", "object", "kind")
LARGEST = 1e15


@dataclass(frozen=True)
class TargetSample:
    """A picture (its path below the data's folder), a text, and the number that both together have.

    ``object`` names what must not be shared by splits.
    """

    id: str
    image: str
    text: str
    target: float
    object: str = ""
    kind: str = ""

    def fault(self) -> str:
        """What is wrong with the sample beside its picture: nothing, or it would not have been read."""
        return ""


def read_targets(path: Path, columns: Mapping[str, str] | None = None) -> list[TargetSample]:
    """Every record of a ``.jsonl``, ``.csv`` or ``.tsv`` file; ``columns`` maps our fields to the file's names.

    Raises DataError with the file and line of the first thing that is wrong.
    """
    path, columns = Path(path), check_columns(columns or {}, FIELDS)
    samples = unique(placed(path, columns))
    if not samples:
        raise DataError(f"{str(path)!r} holds no records: give one JSON object or CSV row a line")
    return samples


def placed(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, TargetSample]]:
    """Every record with its place, FILE:LINE."""
    for line, row in read_rows(path, columns, REQUIRED):
        where = f"{path}:{line}"
        texts = {field: as_text(row.get(name), name, where) for field, name in columns.items()}
        for field in REQUIRED:
            if not texts[field]:
                raise DataError(f"{where}: no {columns[field]!r}: fill it in, or map another with columns.{field}=NAME")
        target = number(texts["target"], columns["target"], where)
        yield where, TargetSample(**texts | {"id": texts["id"] or f"{path.name}:{line}", "target": target})


def number(text: str, name: str, where: str) -> float:
    """The finite number that ``text`` of the column ``name`` writes."""
    try:
        value = float(text if text.isascii() and "_" not in text else "")
    except ValueError:
        raise DataError(f"{where}: {name!r} is {text[:40]!r}, no number: write it as 0.5 or -2") from None
    if not abs(value) < LARGEST:  # also NaN
        raise DataError(f"{where}: {name!r} is {text[:40]!r}: give a finite number below 10^15")
    return value
