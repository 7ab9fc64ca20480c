"""Questions about files from JSONL or CSV: one record a line, a user's own columns by name.

JSONL: ``{"image": "a.jpg", "prompt": "This is a", "answer": "cat"}``; ``id``, ``candidates`` (a list), ``kind`` and
``object`` are optional and other keys are ignored. Several people's answers are a list. CSV: the same by its header,
candidates separated by ``|``.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as declared
from functools import partial
from pathlib import Path
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.alike import Alike, clean, filled
from mitrain.data.formats.manifest import Manifest, Row
from mitrain.data.formats.rows import MISSING, as_text, check_columns, check_meant, inputs_of, listed, split_cell
from mitrain.data.samples import Sample

REQUIRED = ("prompt", "answer")
FIELDS = (*REQUIRED, "id", "candidates", "kind", "object")
SEPARATOR = "|"  # of the candidates in a CSV cell


@dataclass(frozen=True)
class AnswerSample(Sample):
    """Files, a question about them and its answer.

    ``candidates`` are the answers to choose from (none: open); ``object`` names what must not be shared by splits.
    ``references`` are several people's answers, and ``answer`` the commonest of them, of equally common ones the first.
    ``turns``: of a conversation that has gone on, its questions and answers up to the question now; ``prompt`` has them as
    lines.
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...] = ()
    kind: str = ""
    object: str = ""
    references: tuple[str, ...] = ()
    turns: tuple[str, ...] = declared(default=(), compare=False)  # a part of no fingerprint: prompt is


def read_records(
    source: Path | Manifest,
    columns: Mapping[str, str] | None = None,
    missing: Collection[str] = MISSING,
    inputs: Sequence[str] = ("image",),
    may_lack: Collection[str] = (),
) -> list[AnswerSample]:
    """Every record of a file (`Manifest`).

    ``columns`` maps our fields to the file's names where they differ, for example ``{"prompt": "question"}``; ``missing``
    are words that no prompt is, and no answer that is not among its candidates. ``inputs``: the columns that name files, of
    which samples ``may_lack`` some.
    Raises DataError with the file and line of the first thing that is wrong.
    """
    source, columns = Manifest.of(source), check_columns(columns or {}, (*inputs, *FIELDS))
    words = (source.parted, columns, missing, inputs, may_lack)
    own = {"prompt": partial(filled, refused=missing), "kind": clean, "object": clean}
    return Alike(lambda rows: placed(rows, *words), columns, inputs, own).samples(source, REQUIRED)


def placed(
    rows: Iterable[Row],
    parted: bool,
    columns: Mapping[str, str],
    missing: Collection[str],
    inputs: Sequence[str],
    may_lack: Collection[str],
) -> Iterator[tuple[str, AnswerSample]]:
    """Every record with its place, FILE:LINE."""
    for where, name, row in rows:
        if parted and columns["candidates"] in row:
            row[columns["candidates"]] = split_cell(listed(row[columns["candidates"]]), SEPARATOR)
        there = inputs_of(row, columns, inputs, may_lack, where)
        sample = to_sample(row, where, columns, there, default_id=name)
        check_meant(sample.prompt, columns["prompt"], where, missing)
        if not sample.candidates:
            for answer in sample.references or [sample.answer]:
                check_meant(answer, columns["answer"], where, missing)
        yield where, sample


def to_sample(
    row: Mapping[str, Any], where: str, columns: Mapping[str, str], inputs: Mapping[str, str], default_id: str
) -> AnswerSample:
    values = {field: row.get(name) for field, name in columns.items()}
    references = references_of(values["answer"], columns["answer"], where)
    if references:
        values["answer"] = commonest(references)
    texts = {field: as_text(values[field], columns[field], where) for field in FIELDS if field != "candidates"}
    for field in REQUIRED:
        if not texts[field]:
            raise DataError(f"{where}: no {columns[field]!r}: fill it in, or map another with columns.{field}=NAME")
    candidates = values["candidates"] or []
    if not isinstance(candidates, list):
        raise DataError(f'{where}: {columns["candidates"]!r} is no list: write ["yes", "no"]')
    choices = tuple(dict.fromkeys(as_text(choice, columns["candidates"], where) for choice in candidates))
    if choices and texts["answer"] not in choices:
        raise DataError(f"{where}: the answer {texts['answer'][:80]!r} is not among the candidates: add it")
    return AnswerSample(
        **texts | {"id": texts["id"] or default_id}, inputs=inputs, candidates=choices, references=references
    )


def references_of(value: Any, name: str, where: str) -> tuple[str, ...]:
    """Several people's answers, which stand in a list; nothing where ``value`` is one answer."""
    given = listed(value)
    if not isinstance(given, list):
        return ()
    texts = tuple(as_text(answer, name, where) for answer in given)
    if not texts or not all(texts):
        raise DataError(f"{where}: {name!r} is a list with {'an empty answer' if texts else 'no answer'}: give answers")
    return texts


def commonest(answers: Sequence[str]) -> str:
    """The most frequent one, the first of equally frequent ones."""
    return Counter(answers).most_common(1)[0][0]
