"""Rows that are measured once: an interrupted benchmark goes on where it stopped.

OUT/rows/NAME.json     a finished row, until all are there
OUT/results.json       all rows, and how they were made
OUT/table.md           the same for people
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mitrain.core import parsing
from mitrain.core.files import write_atomic, write_json
from mitrain.core.provenance import commit

Row = dict[str, Any]


def row(out: Path, name: str, identity: str | None, measure: Callable[[], Row]) -> Row:
    """The row that an interrupted call has left for the same ``identity``, else what ``measure`` finds.

    One with an "error" is tried again; with the identity None nothing is taken over.
    """
    path = out / "rows" / f"{name}.json"
    found = read(path)
    if identity and found.get("identity") == identity and "error" not in found:
        return found
    start = time.monotonic()
    found = measure()
    found |= {"seconds": round(time.monotonic() - start, 1), "commit": commit(), "identity": identity}
    write_json(path, found)
    return found


def read(path: Path) -> Row:
    """A kept row; nothing where there is none or the file is damaged."""
    try:
        found = parsing.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(out: Path, found: dict[str, Any], table: str) -> None:
    """All that was found; the single rows go."""
    write_json(out / "results.json", found)
    write_atomic(out / "table.md", table)
    shutil.rmtree(out / "rows", ignore_errors=True)
