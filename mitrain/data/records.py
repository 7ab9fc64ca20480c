"""Questions about pictures from JSONL or CSV: one record a line, a user's own columns by name.

JSONL: ``{"image": "a.jpg", "prompt": "This is a", "answer": "cat"}``; ``id``, ``candidates`` (a list), ``kind`` and
``object`` are optional and other keys are ignored. CSV: the same by its header, candidates separated by ``|``.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mitrain.config import nearest
from mitrain.errors import DataError

REQUIRED = ("image", "prompt", "answer")
FIELDS = (*REQUIRED, "id", "candidates", "kind", "object")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SEPARATOR = "|"  # of the candidates in a CSV cell


@dataclass(frozen=True)
class AnswerSample:
    """A picture (its path below the data's folder), a question and its answer.

    ``candidates`` are the answers to choose from (none: open); ``object`` names what must not be shared by splits.
    """

    id: str
    image: str
    prompt: str
    answer: str
    candidates: tuple[str, ...] = ()
    kind: str = ""
    object: str = ""

    def fault(self) -> str:
        """What is wrong with the sample beside its picture: nothing, or it would not have been read."""
        return ""


def read_records(path: Path, columns: Mapping[str, str] | None = None) -> list[AnswerSample]:
    """Every record of a ``.jsonl``, ``.csv`` or ``.tsv`` file.

    ``columns`` maps our fields to the file's names where they differ, for example ``{"prompt": "question"}``.
    Raises DataError with the file and line of the first thing that is wrong.
    """
    path, columns = Path(path), check_columns(columns or {})
    rows = rows_of_csv if path.suffix.lower() in DELIMITERS else rows_of_jsonl
    samples: dict[str, AnswerSample] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, row in rows(file, path, columns):
                sample = to_sample(row, f"{path}:{line}", columns, default_id=f"{path.name}:{line}")
                if sample.id in samples:
                    raise DataError(f"{path}:{line}: the id {sample.id[:80]!r} stands twice: make ids unique")
                samples[sample.id] = sample
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text ({error}): save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error}): give a JSONL or CSV file") from None
    if not samples:
        raise DataError(f"{str(path)!r} holds no records: give one JSON object or CSV row a line")
    return list(samples.values())


def check_columns(columns: Mapping[str, str]) -> dict[str, str]:
    for field in columns:
        if field not in FIELDS:
            raise DataError(f"columns.{field} is not a field{nearest(field, FIELDS)}: map {', '.join(FIELDS)}")
    return {field: columns.get(field, field) for field in FIELDS}


def rows_of_jsonl(file: TextIO, path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON ({error}): write one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: a {type(row).__name__} instead of an object: write {{...}} a line")
        yield line, row


def rows_of_csv(file: TextIO, path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict]]:
    reader = csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if header is None:
                header = check_header(cells, path, columns)
            elif len(cells) > len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(cells)} cells under {len(header)} columns: quote commas"
                )
            elif cells:
                yield reader.line_num, split_candidates(dict(zip(header, cells, strict=False)), columns["candidates"])
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}): quote the cell") from None


def check_header(header: list[str], path: Path, columns: Mapping[str, str]) -> list[str]:
    for field in REQUIRED:
        name = columns[field]
        if header.count(name) != 1:
            problem = "two columns" if name in header else "no column"
            raise DataError(
                f"{path}:1: {problem} {name!r} for {field}{nearest(name, header)}: "
                f"the header has {', '.join(header)[:200]}; map it with columns.{field}=NAME"
            )
    return header


def split_candidates(row: dict[str, Any], column: str) -> dict[str, Any]:
    if column in row:
        row[column] = [part.strip() for part in row[column].split(SEPARATOR) if part.strip()]
    return row


def to_sample(row: Mapping[str, Any], where: str, columns: Mapping[str, str], default_id: str) -> AnswerSample:
    values = {field: row.get(name) for field, name in columns.items()}
    texts = {field: as_text(values[field], field, columns, where) for field in FIELDS if field != "candidates"}
    for field in REQUIRED:
        if not texts[field].strip():
            raise DataError(f"{where}: no {columns[field]!r}: fill it in, or map another with columns.{field}=NAME")
    candidates = values["candidates"] or []
    if not isinstance(candidates, list):
        raise DataError(f'{where}: {columns["candidates"]!r} is no list: write ["yes", "no"]')
    choices = tuple(as_text(choice, "candidates", columns, where) for choice in candidates)
    if choices and texts["answer"] not in choices:
        raise DataError(f"{where}: the answer {texts['answer'][:80]!r} is not among the candidates: add it")
    return AnswerSample(**texts | {"id": texts["id"] or default_id}, candidates=choices)


def as_text(value: Any, field: str, columns: Mapping[str, str], where: str) -> str:
    """Strings as they are, numbers as text, nothing as nothing."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15:
        return str(value)
    raise DataError(f"{where}: {columns[field]!r} is a {type(value).__name__}: give text")
