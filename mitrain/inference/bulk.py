"""Answers in bulk: the rows of a table, asked in batches, a JSON line each; those that are there are not asked again."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from mitrain.core import parsing
from mitrain.core.errors import ConfigError, DataError, UserError
from mitrain.core.files import writing
from mitrain.data.formats.conversations import COLUMNS, asked_behind, question_of
from mitrain.data.formats.manifest import Manifest, read_rows
from mitrain.data.formats.records import SEPARATOR
from mitrain.data.formats.rows import as_text, inputs_of, listed, split_cell
from mitrain.data.samples import BadSamples
from mitrain.data.sources import ConversationsConfig
from mitrain.inference.scoring import Asked, ask_all, values_of
from mitrain.models.digests import frozen_digest
from mitrain.training import runs
from mitrain.training.fingerprint import digest
from mitrain.training.runs import Run


@dataclass(frozen=True)
class AskedRow:
    """A table's row: ``shown`` is what of it the line of its answer repeats."""

    id: str
    asked: Asked
    shown: dict[str, Any]


def predict_file(
    folder: str | Path,
    table: str | Path,
    out: str | Path,
    generation: Mapping[str, Any] | None = None,
    **opening: Unpack[runs.Opening],
) -> dict:
    """Ask a run about every row of ``table`` and write its answers to ``out``; ``opening``: as `runs.open_run` takes it,
    ``generation`` as of `ask_all`."""
    if Path(out).is_dir():
        raise ConfigError(f"--out {str(out)!r} is a folder: with --data it is the file of the answers, as answers.jsonl")
    with writing(out):
        return predict_rows(runs.open_run(folder, **opening), Path(table), Path(out), generation)


def predict_rows(run: Run, table: Path, out: Path, generation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How many rows there are, were asked, and were left out as bad ones, which the data's budget bounds."""
    data, size = run.config.data, run.config.train.eval_batch
    bad = BadSamples(data.bad_samples, data.bad_share)
    rows = list(rows_of(run, table, bad))
    count = len(rows) + len(bad)
    if len({row.id for row in rows}) < len(rows):
        raise DataError(f"{str(table)!r} has an id twice: make ids unique")
    trained = digest([frozen_digest(module) for module in run.model.trainable.values()])[:12]
    model = f"{run.config.name}, step {run.saved.step}, {trained}"
    model += "".join(f", {name}={value}" for name, value in (generation or {}).items())
    done = kept(out, {row.id: row for row in rows}, model)
    left = [row for row in rows if row.id not in done]
    with open(out, "a", encoding="utf-8") as file:
        for start in range(0, len(left), size):
            part = left[start : start + size]
            for row, answer in zip(part, ask_all(run, [row.asked for row in part], generation=generation), strict=True):
                if isinstance(answer, UserError):
                    bad.skip(row.id, str(answer))
                else:
                    line = {"id": row.id, "model": model, **values_of(answer), **row.shown}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
        os.fsync(file.fileno())
    bad.check_share(len(bad), count)
    asked = len(left) - sum(row.id in bad.reasons for row in left)
    return {"out": str(out), "rows": count, "kept": len(done), "asked": asked, "bad_samples": len(bad)}


def rows_of(run: Run, table: Path, bad: BadSamples) -> Iterator[AskedRow]:
    """The rows, under the column names of the run's data, or a conversation each; targets are not looked at."""
    if isinstance(run.config.data, ConversationsConfig):
        first = next(iter(read_rows(table, COLUMNS, ())), None)
        if first is not None and not first.cells.keys().isdisjoint(("conversations", "messages")):
            yield from conversations_of(run, table, bad)
            return
    data, task, source = run.config.data, run.model.task, Manifest.of(table)
    named = getattr(data, "columns", {})
    columns = {field: named.get(field, field) for field in (*data.inputs, task.asks, "id", "candidates")}
    needed = [name for name in data.inputs if name not in data.may_lack]
    needed += [] if task.reads_no_text else [task.asks]
    for where, name, cells in read_rows(source, columns, needed, data.inputs):
        try:
            inputs = inputs_of(cells, columns, data.inputs, data.may_lack, where)
            text = as_text(cells.get(columns[task.asks]), columns[task.asks], where)
            own = as_text(cells.get(columns["id"]), columns["id"], where) or name
        except DataError as error:
            bad.skip(where, str(error))
            continue
        given = cells.get(columns["candidates"]) if task.remembers else None
        given = split_cell(listed(given), SEPARATOR) if source.parted else given
        candidates = [str(choice) for choice in given] if isinstance(given, list) else []
        files = {key: file_of(run, source.root, path) for key, path in inputs.items()}
        shown = {**inputs, task.asks: text, **({"candidates": candidates} if candidates else {})}
        yield AskedRow(own, Asked(files, text, candidates or None), shown)


def file_of(run: Run, folder: Path, path: str) -> Path:
    """Below the table's folder or, as of a table that trained the run, below that of the run's data."""
    plain, trained = path.partition("#")[0], run.config.data.root
    if trained and not (folder / plain).exists() and (Path(trained) / plain).exists():
        return Path(trained) / path
    return folder / path


def conversations_of(run: Run, table: Path, bad: BadSamples) -> Iterator[AskedRow]:
    """The last question of every conversation, with what was said before."""
    data, source = run.config.data, Manifest.of(table)
    for record in read_rows(source, COLUMNS, ()):
        try:
            name, inputs, turns = question_of(record, data.inputs, data.may_lack)
        except DataError as error:
            bad.skip(record.where, str(error))
            continue
        prompt, turns = asked_behind(turns)
        files = {key: file_of(run, source.root, path) for key, path in inputs.items()}
        yield AskedRow(name, Asked(files, prompt, turns=turns), {**inputs, "prompt": prompt})


def kept(out: Path, rows: dict[str, AskedRow], model: str) -> set[str]:
    """The ids of the lines that ``out`` has; half a line at its end, as an interruption leaves one, is cut off.

    ConfigError for a line that another model has written, or of another row.
    """
    if not out.exists():
        return set()
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    done: set[str] = set()
    for number, text in enumerate(whole.decode("utf-8", "replace").splitlines(), start=1):
        try:
            line = parsing.parse_json(text)
            row = rows[line["id"]]
            same = line["model"] == model and all(line.get(name) == value for name, value in row.shown.items())
        except (parsing.Unreadable, LookupError, TypeError):
            same = False
        if not same:
            raise ConfigError(f"{out}:{number} is no answer of {model} to a row of this table: give a new file with --out")
        done.add(line["id"])
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    return done
