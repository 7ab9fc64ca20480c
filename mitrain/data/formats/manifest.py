"""The records of a split, whatever they are written in: one road from a file's rows to a reader's samples.

JSONL, JSON, CSV and TSV (`rows`), WebDataset's tar archives (`shards`), Parquet and the Arrow files of a Hugging Face data
set (here). A split may be several files: ``part-*.parquet``, ``shards/{000..009}.tar``, or a folder of ``save_to_disk``.
A cell that holds a file's bytes, or a list of numbers, becomes an address of itself (`mitrain.data.contents`): what is in it
is read when it is encoded.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mitrain.core import parsing
from mitrain.core.config import nearest
from mitrain.core.errors import DataError, UserError
from mitrain.data import tables
from mitrain.data.formats.foreign import advice
from mitrain.data.formats.rows import Part, all_parts, check_header, is_table, parted
from mitrain.data.formats.shards import rows_of_shard

RANGE = re.compile(r"(.*)\{(\d{1,9})\.\.(\d{1,9})\}(.*)")
MOST_FILES = 1_000_000
FEW = 16  # records of an archive, with texts of many megabytes perhaps, that are read together


class Row(NamedTuple):
    """A record's ``cells`` by column; ``where`` it is, in messages; ``name``: its id where it has none of its own."""

    where: str
    name: str
    cells: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Records of a file, one after another: each one's ``cells`` by column, and its place, which stands behind the
    ``file`` in messages and behind ``name`` in its own name."""

    file: str
    name: str
    places: Sequence[Any]
    cells: Sequence[dict[str, Any]]

    @cached_property
    def columns(self) -> set[str]:
        """The columns that some of the records have."""
        return set().union(*self.cells)

    def __len__(self) -> int:
        return len(self.cells)

    def cut(self, start: int, end: int | None = None) -> "Block":
        return Block(self.file, self.name, self.places[start:end], self.cells[start:end])

    def row(self, number: int) -> Row:
        return Row(f"{self.file}{self.places[number]}", self.name_of(number), self.cells[number])

    def name_of(self, number: int) -> str:
        return f"{self.name}{self.places[number]}"

    def rows(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


@dataclass
class Manifest:
    """The records of a split: ``file`` below ``root`` names a file, a folder of ``save_to_disk``, or several files."""

    root: Path
    file: str
    checks_columns: ClassVar[bool] = True  # whether a column that somebody asked for must stand in one of its records

    @classmethod
    def of(cls, source: "Path | str | Manifest") -> "Manifest":
        return source if isinstance(source, cls) else cls(Path(source).parent, Path(source).name)

    def __str__(self) -> str:
        return os.path.normpath(Path(self.root) / self.file)  # `init` writes a table beside its pictures as ../table.csv

    @property
    def parted(self) -> bool:
        """Whether cells are plain text, so that lists in them need a separator."""
        return is_table(Path(self.file))

    def files(self) -> list[Path]:
        """Its files in their order; DataError where a pattern names none."""
        path, span = Path(self.root) / self.file, RANGE.fullmatch(self.file)
        if path.is_dir():
            return saved_files(path)
        if span and not path.exists():
            first, last = int(span[2]), int(span[3])
            if not 0 <= last - first < MOST_FILES:
                raise DataError(f"{self.file!r} names no files: count from the lower number to the higher")
            return [Path(self.root) / f"{span[1]}{n:0{len(span[2])}}{span[4]}" for n in range(first, last + 1)]
        if any(mark in self.file for mark in "*?[") and not path.exists():
            if found := sorted(Path(self.root).glob(self.file)):
                return found
            raise DataError(f"no file {self.file!r} in {str(self.root)!r}: correct data.splits")
        return [path]

    def is_there(self) -> bool:
        try:
            return all(path.exists() for path in self.files())
        except DataError:
            return False

    def sizes(self) -> list[tuple[str, int]]:
        """Path below ``root`` and bytes of each file."""
        return [(os.path.relpath(path, self.root), path.stat().st_size) for path in self.files()]

    def blocks(self, columns: Mapping[str, str], required: Sequence[str], inputs: Sequence[str]) -> Iterator[Block]:
        """Every record; arguments as of `read_blocks`."""
        for path in self.files():
            yield from blocks_in(path, self.root, columns, required, inputs)


def read_rows(
    source: Path | Manifest, columns: Mapping[str, str], required: Sequence[str], inputs: Sequence[str] = ()
) -> Iterator[Row]:
    """Every record of a ``source``, one by one; arguments and errors as of `read_blocks`."""
    return chain.from_iterable(block.rows() for block in read_blocks(source, columns, required, inputs))


def read_blocks(
    source: Path | Manifest, columns: Mapping[str, str], required: Sequence[str], inputs: Sequence[str] = ()
) -> Iterator[Block]:
    """Every record of a ``source``, many at a time: of a million, each that is handed on by itself would cost a second.

    ``columns`` maps our fields to the file's names, and ``inputs`` are those that name files; those ``required`` must stand
    in a table's header, and a name that differs from the field's is a column that somebody asked for: one that no record has
    is refused. Raises DataError with file and line of the first thing that is wrong.
    """
    source = Manifest.of(source)
    asked = {name: field for field, name in columns.items() if name != field}
    seen: set[str] = set()
    for block in source.blocks(columns, required, inputs):
        for number, cells in () if seen else enumerate(block.cells):
            if cells and any(columns[f] not in cells for f in required) and (known := advice(cells)):
                if number:  # what is wrong before it is said first
                    yield block.cut(0, number)
                raise DataError(f"{block.row(number).where}: the record is of {known}")
            if cells:
                break
        seen |= block.columns
        yield block
    for name in asked.keys() - seen if seen and source.checks_columns else ():
        there = ", ".join(sorted(seen))[:200]
        raise DataError(
            f"{str(source)!r} has no {name!r}{nearest(name, seen)} in any record, only {there}: "
            f"correct columns.{asked[name]}={name}"
        )


def blocks_in(
    path: Path, root: Path, columns: Mapping[str, str], required: Sequence[str], inputs: Sequence[str]
) -> Iterator[Block]:
    if path.suffix not in (".parquet", ".arrow", ".tar"):
        for part in all_parts(path, columns, required):
            yield Block(f"{path}:", f"{path.name}:", *part)
        return
    files, address = {columns[name] for name in inputs}, os.path.relpath(path, root)
    try:
        if path.suffix == ".tar":
            for part in parted(rows_of_shard(path, address, columns.values(), files), FEW):
                yield Block(f"{path}:", f"{address}:", *part)
        else:
            for part in parts_of_table(path, address, columns, required, files):
                yield Block(f"{path}#", f"{address}#", *part)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds for what is torn or hostile
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"cannot read {str(path)!r} ({reason}): write it again") from None


def parts_of_table(
    path: Path, address: str, columns: Mapping[str, str], required: Sequence[str], files: set[str]
) -> Iterator[Part]:
    """The records of a Parquet or Arrow file, numbered from 0. ``files``: columns of inputs."""
    table = tables.opened(path)
    there = {field.name: field.type for field in table.schema}
    check_header(table.schema.names, path, columns, required)
    wanted = [name for name in dict.fromkeys(columns.values()) if name in there]
    held = {name for name in files & there.keys() if tables.is_content(there[name]) or tables.is_list(there[name])}
    classes, number = class_names(table.schema), 0
    # Of a struct of bytes its path alone is read, which tells where there is none.
    paths = {name for name in held if str(there[name]).startswith("struct<")}
    for batch in table.batches([f"{name}.path" if name in paths else name for name in wanted]):
        parts = []
        for name in wanted:
            column = batch.column(name)
            if name in held:
                valid = enumerate(column.is_valid().to_pylist(), number)
                parts.append([f"{address}#{row:09}/{name}" if there else None for row, there in valid])
            else:
                parts.append([plain(value, classes.get(name)) for value in column.to_pylist()])
        rows = [dict(zip(wanted, cells, strict=True)) for cells in zip(*parts, strict=True)]
        if rows:
            yield range(number, number + len(rows)), rows
        number += batch.num_rows


def plain(value: Any, names: Sequence[str] | None) -> Any:
    """A cell's value; of a class its name. NaN, which pandas writes into an empty cell of numbers, is nothing."""
    if isinstance(value, list):
        return [plain(one, names) for one in value]
    if names and type(value) is int:
        return names[value] if 0 <= value < len(names) else None  # −1: no label
    return None if value != value else value


def class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes that Hugging Face's features number, by column."""
    try:
        stated = parsing.parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stated.get("info", {}).get("features", {}) if isinstance(stated, dict) else {}
    except parsing.Unreadable:
        return {}
    found = {name: (one.get("feature") or one) for name, one in features.items() if isinstance(one, dict)}
    return {name: one["names"] for name, one in found.items() if isinstance(one, dict) and one.get("names")}


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that ``save_to_disk`` wrote into ``folder``."""
    try:
        state = parsing.read_json(folder / "state.json")
        names = [part["filename"] for part in state["_data_files"]]
    except FileNotFoundError:
        splits = [path.parent.name for path in sorted(folder.glob("*/state.json"))]
        mend = f"name one of its splits, {', '.join(splits)}, in data.splits" if splits else "name a file, or a folder of it"
        raise DataError(f"{str(folder)!r} is no data set of save_to_disk (it has no state.json): {mend}") from None
    except (OSError, parsing.Unreadable, KeyError, TypeError) as error:
        raise DataError(f"{str(folder / 'state.json')!r} cannot be read ({error}): save the data set again") from None
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"{str(folder / 'state.json')!r} names files outside of its folder: save the data set again")
    return [folder / name for name in names]
