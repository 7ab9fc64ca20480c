"""Many cases compiled and audited: in several processes, and each only once, as its row is kept in the user's cache.

A row is found again by everything that it depends on: the kernel's source and that of the functions it calls, the
case, the target, Triton's version and settings, and the sources of the auditor itself.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from bench.machine_code import audit, compilation, mma, pipes, sass
from bench.machine_code.compilation import Case

Row = dict[str, Any]
Work = tuple[Case, str]  # a case and its target


def cache_folder() -> Path:
    """``$MITRAIN_CACHE``, else ``$XDG_CACHE_HOME/mitrain``, else ``~/.cache/mitrain``, and in it ``aot``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("MITRAIN_CACHE") or Path(base) / "mitrain"
    return Path(home).expanduser() / "aot"


@cache
def own_source() -> str:
    """A checksum of the code that makes the rows."""
    sources = [Path(module.__file__).read_bytes() for module in (audit, compilation, mma, pipes, sass)]
    return hashlib.sha256(b"".join(sources)).hexdigest()


def key_of(case: Case, target: str) -> str:
    """A checksum of all that a row depends on."""
    settings = {name: x for name, x in os.environ.items() if name.startswith(("TRITON_", "PTXAS_"))}
    parts = {**vars(case), "kernel": case.kernel.cache_key, "target": target, "settings": settings}
    text = json.dumps([parts, triton.__version__, own_source()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_row(key: str) -> Row | None:
    """The row kept under ``key``; None if there is none or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((cache_folder() / f"{key}.json").read_text(encoding="utf-8"))
    return None


def write_row(key: str, row: Row) -> None:
    """Keep the row, whole or not at all. A cache that cannot be written costs time and no more."""
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{key}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(row, file)
        os.replace(temporary, folder / f"{key}.json")


def audited(case: Case, target: str, afresh: bool = False) -> Row:
    """Compile and audit one case, in this process; a case that does not compile is a violation.

    Whatever Triton prints goes to stderr. ``afresh``: not even Triton's own cache is read.
    """
    start = time.monotonic()
    try:
        with knobs.compilation.scope(), contextlib.redirect_stdout(sys.stderr):
            knobs.compilation.always_compile |= afresh
            row = audit.audit_row(compilation.compile_case(case, target), case, target)
    except Exception as error:  # of Triton, LLVM or ptxas: of any class
        row = audit.failed_row(case, target, f"does not compile: {first_line(error)}")
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def audited_elsewhere(case: Case, target: str, afresh: bool) -> Row:
    """``audited`` in a worker process, where the compiler's own output goes to stderr too."""
    os.dup2(2, 1)
    return audited(compilation.resolved(case), target, afresh)


def run_all(work: Sequence[Work], jobs: int, afresh: bool) -> Iterator[tuple[int, Row]]:
    """(index, row) for every item of work, as they get ready."""
    if min(jobs, len(work)) < 2:
        yield from ((i, audited(*item, afresh)) for i, item in enumerate(work))
        return
    with ProcessPoolExecutor(min(jobs, len(work)), multiprocessing.get_context("spawn")) as pool:
        pending: dict[Future[Row], int] = {}
        for i, (case, target) in enumerate(work):
            pending[pool.submit(audited_elsewhere, compilation.portable(case), target, afresh)] = i
        for future in as_completed(pending):
            i = pending[future]
            error = future.exception()
            yield i, future.result() if error is None else lost_row(*work[i], error)


def lost_row(case: Case, target: str, error: BaseException) -> Row:
    return {**audit.failed_row(case, target, f"the compiler died: {first_line(error)}"), "seconds": 0.0}


def audit_all(
    work: Sequence[Work], jobs: int, cached: bool = True, progress: Callable[[int, Row], None] = lambda *_: None
) -> list[Row]:
    """The rows of all work in its order; ``progress(left, row)`` is called for each that had to be compiled.

    Rows of cases that did not compile are not kept: the reason may have been the machine.
    """
    keys = [key_of(*item) for item in work]
    rows: list[Row | None] = [read_row(key) if cached else None for key in keys]
    missing = [i for i, row in enumerate(rows) if row is None]
    for done, (j, row) in enumerate(run_all([work[i] for i in missing], jobs, not cached), start=1):
        rows[missing[j]] = row
        if row["instructions"]:
            write_row(keys[missing[j]], row)
        progress(len(missing) - done, row)
    return [row for row in rows if row is not None]
