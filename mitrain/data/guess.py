"""What the columns of a user's table are: files of a kind, a label, a number, a question, a text.

Guessed from their names and from the first rows; whoever asks may say some of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from mitrain.core.config import nearest
from mitrain.core.errors import DataError
from mitrain.core.parsing import Unreadable
from mitrain.data.formats.conversations import KINDS, listed_files, turns_of
from mitrain.data.formats.manifest import Row
from mitrain.data.formats.rows import MISSING, all_rows, open_text, read_table
from mitrain.data.kinds import BY_ENDING

ROWS = 2000  # that are looked at
NAMES = {
    "answer": "answer answers response output reply label",
    "prompt": "prompt question instruction query",
    "candidates": "candidates choices options",
    "label": "label labels class classes category emotion genre genres tag tags target y",
    "target": "target score rating stars sentiment value label y",
    "text": "text caption sentence title description utterance transcript transcription comment name",
    "object": "object group speaker subject person session item dialogue",
    "kind": "kind",
    "id": "id uid key",
}
"""What people call a column of a sample's field, likeliest first."""
FIELDS = {
    "answer": ("prompt", "answer"),
    "classify": ("label",),
    "regress": ("target",),
    "caption": ("text",),
    "retrieve": ("text",),
}
"""The fields that a task's samples must have."""
ALSO = {"answer": ("candidates", "kind"), "classify": ("text", "kind"), "regress": ("text", "kind")}
"""Those that they may have, beside id and object."""
MOST_CLASSES = 1000


@dataclass(frozen=True)
class Guess:
    """``inputs``: kind of file by column, ``fields``: column by field; ``lacking``: columns of files that some rows leave
    empty; ``root``: the folder that their paths are below; ``first``: the first of them, by column;
    ``unused``: columns that are left out; ``format``: of the data, where the task does not say it."""

    task: str
    inputs: Mapping[str, str]
    fields: Mapping[str, str]
    lacking: tuple[str, ...]
    root: Path
    first: Mapping[str, str]
    unused: tuple[str, ...]
    format: str = ""


def guess(table: Path, task: str | None, said: Mapping[str, str], files: Path | None) -> Guess:
    """What the ``table`` is for; ``task`` and columns that are ``said`` (by field) are taken as they are, and ``files`` is
    the folder of its files.

    Raises DataError for what cannot be told.
    """
    rows = [row for _, row in islice(all_rows(table, {}, ()), ROWS)]
    if not rows:
        raise DataError(f"{table} holds no rows: give a CSV, TSV, JSONL or JSON file with one sample a row")
    if isinstance(rows[0].get("conversations", rows[0].get("messages")), list):
        if task not in (None, "answer") or said:
            raise DataError(f"{table} holds conversations, whose answers are learned: leave out the task and --column")
        return guess_conversations(table, files)
    columns = {name: [str(row[name]) for row in rows if filled(row.get(name))] for row in rows for name in row}
    for field, name in said.items():
        if name not in columns:
            there = ", ".join(columns)[:200]
            raise DataError(f"{table} has no column {name!r}{nearest(name, columns)} for {field}, only {there}")
    inputs = {name: kind for name, values in columns.items() if (kind := kind_of(values)) and name not in said.values()}
    if not inputs:
        raise DataError(
            f"no column of {table} names files of a known kind ({', '.join(columns)[:200]}): mitrain trains on pictures,"
            " sound, video, arrays or text files that stand in a column as paths"
        )
    others = {name: values for name, values in columns.items() if name not in inputs and values}
    task = task or task_of(others, said, table)
    fields = fields_of(task, others, said)
    if lost := [field for field in FIELDS[task] if field not in fields]:
        raise DataError(
            f"no column of {table} is known to be the {lost[0]} of {task!r}: say which with --column {lost[0]}=NAME, one of"
            f" {', '.join(others)[:200]}"
        )
    if fields.get("id") and len(set(others[fields["id"]])) < len(rows):
        del fields["id"]
    lacking = tuple(name for name in inputs if len(columns[name]) < len(rows))
    root = files or root_of(table, {path for name in inputs for path in columns[name]})
    return Guess(
        task,
        inputs,
        fields,
        lacking,
        root,
        {name: columns[name][0] for name in inputs},
        tuple(others.keys() - set(fields.values())),
    )


def fields_of(task: str, columns: Mapping[str, list[str]], said: Mapping[str, str]) -> dict[str, str]:
    """The column of each field of ``task`` that is ``said`` or can be told by name or contents."""
    fields = dict(said)
    for field in (*FIELDS[task], *ALSO.get(task, ()), "object", "id"):
        left = {name: values for name, values in columns.items() if name not in fields.values()}
        if field not in fields and (name := column_for(field, left, required=field in FIELDS[task])):
            fields[field] = name
    return fields


def guess_conversations(table: Path, files: Path | None) -> Guess:
    """What LLaVA's, ShareGPT's or a chat API's JSON is about: as many inputs of a kind as a conversation has files of it."""
    found: list[dict[str, str]] = []
    for number, cells in islice(all_rows(table, {}, ()), ROWS):
        row = Row(f"{table}:{number}", str(number), cells)
        shown = turns_of(row)[1]
        named = {kind: [path for path in shown[kind] if path] or listed_files(row, kind) for kind in KINDS}
        found.append({f"{kind}{n + 1 if n else ''}": path for kind in KINDS for n, path in enumerate(named[kind])})
    inputs = {name: name.rstrip("0123456789") for name in sorted({name for files_of in found for name in files_of})}
    if not inputs:
        raise DataError(f"no conversation of {table} has a file ({', '.join(KINDS)}): name it beside the conversation")
    root = files or root_of(table, {path for files_of in found for path in files_of.values()})
    lacking = tuple(name for name in inputs if any(name not in files_of for files_of in found))
    return Guess("answer", inputs, {}, lacking, root, {}, (), "conversations")


def guess_folders(top: Path) -> Guess:
    """What a folder is, in which each class has its folder, below train, val and test or not."""
    own = top / "train" if (top / "train").is_dir() else top
    files = [path.name for path in sorted(own.rglob("*"))[:ROWS] if path.is_file()]
    classes = [path for path in own.iterdir() if path.is_dir() and not path.name.startswith(".")]
    kind = kind_of(files)
    if not kind or len(classes) < 2:
        raise DataError(f"{str(own)!r} has no folders of files of one known kind: give a table, or a folder for each class")
    return Guess("classify", {kind: kind}, {}, (), top, {}, ())


def guess_expressions(table: Path, task: str | None, said: Mapping[str, str]) -> Guess | None:
    """What COCO's JSON with referring expressions is; None of any other file, unless the ``task`` says that it is such."""
    tables = read_table(table) if table.suffix.lower() == ".json" and starts_as_object(table) else {}
    if task not in (None, "segment") or not {"images", "annotations"} <= tables.keys():
        if task == "segment":
            raise DataError(f"{table} is no COCO JSON: give images, and annotations with a segmentation and an expression")
        return None
    if strange := said.keys() - {"expression"}:
        raise DataError(f"--column {min(strange)}=…: of COCO's JSON only expression=KEY can be said")
    return Guess("segment", {"image": "image"}, said, (), table.parent, {}, ())


def starts_as_object(path: Path) -> bool:
    """Whether a JSON file holds an object, not a list."""
    try:
        with open_text(path) as file:
            return file.read(200).lstrip().startswith("{")
    except (OSError, ValueError, Unreadable):
        return False  # whoever reads it says what is wrong


def filled(value: Any) -> bool:
    return value is not None and str(value).strip() not in ("", *MISSING)


def kind_of(values: Sequence[str]) -> str:
    """The kind of files that most of ``values`` are paths of; empty for no paths."""
    kinds = [BY_ENDING.get(PurePosixPath(value.partition("#")[0]).suffix.lower(), "") for value in values]
    likeliest = max(set(kinds), key=kinds.count, default="")
    return likeliest if likeliest and kinds.count(likeliest) > 0.8 * len(kinds) else ""


def task_of(others: Mapping[str, Sequence[str]], said: Mapping[str, str], table: Path) -> str:
    by_said = [task for task, fields in FIELDS.items() if set(said) & ({*fields} - {"text"})]
    if by_said:
        return by_said[0]
    if all(any(name.lower() in NAMES[field].split() for name in others) for field in ("prompt", "answer")):
        return "answer"
    if column_for("target", others) and not column_for("label", others):
        return "regress"
    if column_for("label", others, required=True):
        return "classify"
    if column_for("text", others, required=True):
        return "caption"
    raise DataError(f"{table} has no column beside files: what is to be learned? Name it with --column label=NAME")


def column_for(field: str, columns: Mapping[str, Sequence[str]], required: bool = False) -> str:
    """The column of a field: by its name, else, where it is ``required``, by what stands in it; empty for none."""
    fits = {"label": is_label, "target": is_number}.get(field, lambda values: True)
    by_name = {name.lower(): name for name, values in columns.items() if fits(values)}
    for name in NAMES[field].split():
        if name in by_name:
            return by_name[name]
    likely = [name for name in by_name.values() if fits is not is_label or not is_number(columns[name])]
    if not required or not likely or field in ("prompt", "answer"):
        return ""
    return max(likely, key=lambda name: sum(map(len, columns[name])) * (1 if field == "text" else -1))


def is_number(values: Sequence[str]) -> bool:
    """Whether they are numbers, and more of them than classes would be."""
    try:
        numbers = {float(value) for value in values}
    except ValueError:
        return False
    return len(numbers) > 10 or any(number != int(number) for number in numbers if abs(number) < 1e15)


def is_label(values: Sequence[str]) -> bool:
    """Whether they repeat, as classes do."""
    return 2 <= len(set(values)) <= min(MOST_CLASSES, max(2, len(values) // 2)) and not is_number(values)


def root_of(table: Path, paths: set[str]) -> Path:
    """The folder below which the files are: that of the table, one beside it, or the next above."""
    some = sorted(paths)[:50]
    beside = [folder for folder in sorted(table.parent.iterdir()) if folder.is_dir()] if table.parent.is_dir() else []
    for folder in (table.parent, *beside, table.parent.parent):
        if sum((folder / path).is_file() for path in (p.partition("#")[0] for p in some)) > len(some) / 2:
            return folder
    raise DataError(
        f"most files that {table} names, as {some[0]!r}, are neither below {str(table.parent)!r} nor in a folder in it: say"
        " where they are with --files DIR"
    )
