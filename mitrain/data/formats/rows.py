"""Rows of a user's own JSONL, CSV or TSV file, with the columns under the user's own names.

One record a line; every fault is a DataError that names file and line. A table may be in Windows' or UTF-16's letters,
its cells parted by other marks, as spreadsheets save them: what is not UTF-8 and commas (tabs in .tsv) is said in a line.
"""

import codecs
import csv
import io
import logging
import re
import warnings
from ast import literal_eval
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

from mitrain.core import parsing
from mitrain.core.config import nearest
from mitrain.core.errors import DataError
from mitrain.core.parsing import Unreadable
from mitrain.data.columns import gathered
from mitrain.data.formats.foreign import advice

DELIMITERS = {".csv": ",", ".tsv": "\t"}
MARKS = ",;\t|"
UTF8, WINDOWS, UTF16 = "utf-8-sig", "cp1252", "utf-16"
MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
log = logging.getLogger(__name__)

PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bzip2, xz, zstandard

MISSING = ("nan", "NaN", "None", "null", "NULL", "<NA>", "NaT", "NA", "#N/A")
"""What pandas, SQL, R and spreadsheets write for an empty cell."""

CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # white space is none

AT_ONCE = 512  # records that are read together
LONGEST_LIST = 10_000  # characters of a cell that is looked at as a list

ARRAY_ITEM = re.compile(r"""'[^']*'|"[^"]*"|[-+]?\d[-+.\de]*""")
ARRAY = re.compile(rf"\[\s*(?:{ARRAY_ITEM.pattern})(?:\s+(?:{ARRAY_ITEM.pattern}))+\s*\]")
"""As numpy writes one, without commas; Python would read its texts as one long text."""

T = TypeVar("T")
Line = tuple[int, dict[str, Any]]  # its number, cells by column
Part = tuple[Sequence[int], list[dict[str, Any]]]  # the same of several lines


def all_rows(path: Path, columns: Mapping[str, str], required: Sequence[str]) -> Iterator[Line]:
    """Line number and cells of every record of a file, as `all_parts` reads it."""
    return chain.from_iterable(zip(*part, strict=True) for part in all_parts(path, columns, required))


def all_parts(path: Path, columns: Mapping[str, str], required: Sequence[str]) -> Iterator[Part]:
    """Line numbers and cells of all records of a ``.jsonl``, ``.csv`` or ``.tsv`` file, `AT_ONCE` at a time.

    A ``.json`` file with one list of objects, as BLIP's are, is read too; its records are numbered from 1.
    """
    with reading(path, "give a JSONL or CSV file"):
        if path.suffix.lower() == ".json":
            yield from parted(rows_of_json(path))
        elif path.suffix.lower() not in DELIMITERS:
            with open_text(path) as file:
                yield from parts_of_jsonl(file, path)
        else:
            stat = path.stat()
            encoding, mark = written(path, stat.st_mtime_ns, stat.st_size)
            with open_text(path, encoding) as file:
                yield from parted(rows_of_csv(file, path, columns, required, mark))


def in_parts(items: Iterator[T], size: int | None = None) -> Iterator[list[T]]:
    """The ``items``, ``size`` (`AT_ONCE`) at a time; those before one that cannot be read come before it is told."""
    fault, part = None, [...]
    while part and fault is None:
        part = []
        try:
            part.extend(islice(items, size or AT_ONCE))
        except Exception as error:
            fault = error
        if part:
            yield part
    if fault is not None:
        raise fault


def parted(lines: Iterator[Line], size: int | None = None) -> Iterator[Part]:
    for part in in_parts(lines, size):
        numbers, rows = zip(*part, strict=True)
        yield numbers, list(rows)


@contextmanager
def reading(path: Path, mend: str) -> Iterator[None]:
    """Inside, what keeps ``path`` from being read is a DataError that ends in ``mend``."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except Unreadable as error:
        raise DataError(f"{str(path)!r} {error}: {mend}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error}): {mend}") from None


def open_text(path: Path, encoding: str = UTF8) -> TextIO:
    return io.TextIOWrapper(parsing.open_regular(path), encoding=encoding, newline="")


@lru_cache(maxsize=256)  # said once
def written(path: Path, _time: int, _size: int) -> tuple[str, str]:
    """A table's encoding, and the mark that parts its cells."""
    encoding = encoding_of(path)
    if encoding != UTF8:
        name = "UTF-16" if encoding == UTF16 else "Windows-1252 (latin-1)"
        log.warning("%s is not UTF-8 and is read as %s: where letters come out wrong, save it as UTF-8", path, name)
    usual = DELIMITERS[path.suffix.lower()]
    with open_text(path, encoding) as file:
        header = next((line for line in parsing.lines_of(file) if line.strip()), "")
    counts = {mark: columns_of(header, mark) for mark in MARKS}
    mark = max(MARKS, key=lambda mark: (counts[mark], mark == usual))
    if mark != usual:
        log.warning("%s: cells are parted by %r, as its header has them", path, mark)
    return encoding, mark


def encoding_of(path: Path) -> str:
    """Windows-1252 only where no character of UTF-8 stands in the file: else it is UTF-8 that was torn, which is refused by
    whoever decodes it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with parsing.open_regular(path) as file:
        start = file.read(4)
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return UTF16
        file.seek(0)
        try:
            for part in iter(partial(file.read, 1 << 20), b""):
                decoder.decode(part)
            decoder.decode(b"", final=True)
            return UTF8
        except UnicodeDecodeError:
            pass
    content = parsing.read_bytes(path, parsing.DATA_BYTES)
    foreign = content.startswith(PACKED) or b"\0" in content or MULTIBYTE.search(content)
    return UTF8 if foreign else WINDOWS


def columns_of(header: str, mark: str) -> int:
    """How many names a header has if ``mark`` parts them; 0 where its quotes say that it does not."""
    try:
        return len(next(csv.reader([header], delimiter=mark, strict=True), []))
    except csv.Error:
        return 0


def read_whole(path: Path) -> Any:
    """The value in a JSON file. Raises Unreadable, UnicodeDecodeError and OSError."""
    return parsing.parse_json(parsing.read_bytes(path, parsing.DATA_BYTES).decode("utf-8-sig"))


def not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    """The fault of a file that could not be decoded: compressed, or of another encoding."""
    with open(path, "rb") as file:
        packed = file.read(8).startswith(PACKED)
    if packed:
        return DataError(f"{str(path)!r} is compressed, or a spreadsheet: unpack it, or save it as text in UTF-8")
    return DataError(f"{str(path)!r} is not UTF-8 text ({error}): save it as UTF-8")


def read_table(path: Path) -> dict[str, Any]:
    """The one JSON object that a file holds."""
    with reading(path, "get the original file"):
        value = read_whole(path)
    if not isinstance(value, dict):
        raise DataError(f"{str(path)!r} holds a {type(value).__name__} instead of an object: get the original file")
    return value


def folder_in(root: Path, names: Sequence[str], mend: str, what: str = "picture folder") -> str:
    """The first of the ``names`` that is a folder in ``root``; DataError, which ends in ``mend``, where none is."""
    found = next((name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise DataError(f"no {what} {' or '.join(names)} in {str(root)!r}: {mend}")
    return found


def list_in(path: Path, key: str, table: Mapping[str, Any] | None = None) -> list[Any]:
    """The list ``key``, with something in it, of the object that a file holds (``table``, where it has been read)."""
    value = (read_table(path) if table is None else table).get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"{str(path)!r} has no list {key!r}: get the original file")
    return value


def is_table(path: Path) -> bool:
    """Whether the file's cells are plain text (CSV, TSV), so that lists in them need a separator."""
    return Path(path).suffix.lower() in DELIMITERS


def inputs_of(
    row: Mapping[str, Any], columns: Mapping[str, str], inputs: Sequence[str], may_lack: Collection[str], where: str
) -> dict[str, str]:
    """A record's files by their names. DataError for one that is missing and not among those that samples ``may_lack``."""
    paths = {name: as_text(row.get(columns[name]), columns[name], where) for name in inputs}
    for name, path in paths.items():
        if not path and name not in may_lack:
            raise DataError(
                f"{where}: no {columns[name]!r}: fill it in, map another with columns.{name}=NAME, or let samples go"
                f" without it with data.may_lack=[{name}]"
            )
    return {name: path for name, path in paths.items() if path}


def check_columns(columns: Mapping[str, str], fields: Sequence[str]) -> dict[str, str]:
    """Every field with the file's name for it."""
    for field in columns:
        if field not in fields:
            raise DataError(f"columns.{field} is not a field{nearest(field, fields)}: map {', '.join(fields)}")
    return {field: columns.get(field, field) for field in fields}


def parts_of_jsonl(file: TextIO, path: Path) -> Iterator[Part]:
    first = 1
    for part in in_parts(parsing.lines_of(file)):
        numbers = range(first, first + len(part))
        if (rows := parsing.plain_objects(part)) is not None:
            yield numbers, rows
        else:
            numbered = zip(numbers, part, strict=True)
            yield from parted((line, json_object(text, f"{path}:{line}")) for line, text in numbered if text.strip())
        first += len(part)


def rows_of_json(path: Path) -> Iterator[Line]:
    rows = read_whole(path)
    if not isinstance(rows, list):
        known = advice(rows)
        raise DataError(
            f"{str(path)!r} holds {known}"
            if known
            else f"{str(path)!r} holds a {type(rows).__name__} instead of a list: give one object a line (.jsonl)"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a {type(row).__name__} instead of an object: write {{...}}")
        yield number, row


def json_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = parsing.parse_json(text)
    except Unreadable as error:
        raise DataError(f"{where}: {str(error).removeprefix('is ')}: write one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__} instead of an object: write {{...}} a line")
    return row


def rows_of_csv(file: TextIO, path: Path, columns: Mapping[str, str], required: Sequence[str], mark: str) -> Iterator[Line]:
    header: list[str] | None = None
    for line, cells in cells_of_csv(file, path, mark):
        if header is None:
            names = [cell.strip() for cell in cells]
            header = check_header(names, f"{path}:1", columns, required) if any(names) else None
        elif len(cells) > len(header):
            raise DataError(
                f"{path}:{line}: {len(cells)} cells under {len(header)} columns: quote cells with {mark!r} in them"
            )
        elif cells:
            yield line, dict(zip(header, cells, strict=False))


def cells_of_csv(file: TextIO, path: Path, mark: str) -> Iterator[tuple[int, list[str]]]:
    """Cells of every row, blank ones among them, and the line that it begins in."""
    reader = csv.reader(parsing.lines_of(file), delimiter=mark, strict=True)
    begin = 1
    try:
        for cells in reader:
            yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        problem = "a quote that is not closed" if "end of data" in str(error) else str(error)
        over = f", read to line {reader.line_num}" if reader.line_num > begin else ""
        mend = "close its quotes, or use JSONL for long texts" if over or "limit" in problem else "quote the cell"
        raise DataError(f"{path}:{begin}: not valid CSV ({problem}{over}): {mend}") from None


def check_header(header: list[str], where: Any, columns: Mapping[str, str], required: Sequence[str]) -> list[str]:
    """The names of a table's columns, each of those ``required`` once among them."""
    for field in required:
        name = columns[field]
        if header.count(name) != 1:
            problem = "two columns" if name in header else "no column"
            raise DataError(
                f"{where}: {problem} {name!r} for {field}{'' if name in header else nearest(name, header)}: "
                f"the header has {', '.join(header)[:200]}; map it with columns.{field}=NAME"
            )
    return header


def as_text(value: Any, name: str, where: str) -> str:
    """Strings without blanks around them, numbers as text, nothing as nothing; ``name`` is the column's."""
    if value is None:
        return ""
    if isinstance(value, str):
        if control := CONTROL.search(value):
            raise DataError(
                f"{where}: {name!r} holds the control character {control[0]!r}: remove it, or save the file as UTF-8 text"
            )
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15:
        return str(value)
    raise DataError(f"{where}: {name!r} is a {type(value).__name__}: give text")


def check_meant(text: str, name: str, where: str, missing: Collection[str]) -> None:
    """DataError where a cell that must be filled holds one of the words ``missing``, as written into an empty one."""
    if text in missing:
        raise DataError(
            f"{where}: {name!r} is {text!r}, as programs write an empty cell: fill it in, or give data.missing=[] if such"
            " words mean what they say"
        )


def listed(value: Any) -> Any:
    """The list, tuple, set or array that a cell holds as JSON, Python or numpy write it; else the value as it is."""
    if not (isinstance(value, str) and value[:1] + value[-1:] in ("[]", "()", "{}") and len(value) < LONGEST_LIST):
        return value
    if ARRAY.fullmatch(value):
        return [item.strip("'\"") for item in ARRAY_ITEM.findall(value)]
    for read in (parsing.parse_json, literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):
                items = read(value)
        except (Unreadable, ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        texts = isinstance(items, tuple | set) and all(isinstance(item, str) for item in items)  # "(3, 4)" is a text
        items = sorted(items) if texts and isinstance(items, set) else list(items) if texts else items
        return items if isinstance(items, list) else value
    return value


def split_cell(value: Any, separator: str) -> Any:
    """A cell of several values as their list; what is no text stays as it is."""
    return [part.strip() for part in value.split(separator) if part.strip()] if isinstance(value, str) else value


def unique(samples: Iterator[tuple[str, Any]]) -> Sequence[Any]:
    """The samples of (place, sample) pairs (`gathered`); DataError where two have one id."""
    return gathered(with_own_ids(samples))


def with_own_ids(samples: Iterator[tuple[str, Any]]) -> Iterator[Any]:
    seen: set[str] = set()
    for where, sample in samples:
        require_new(sample.id, seen, where)
        yield sample


def require_new(name: str, seen: set[str], where: str) -> None:
    """Let ``name`` be one of those ``seen``; DataError where it was."""
    if name in seen:
        raise DataError(f"{where}: the id {name[:80]!r} stands twice: make ids unique")
    seen.add(name)
