"""``mitrain bench stream``: the memory that an epoch of streamed samples takes above what is there without them.

Rows of a vector, a text and a number in Parquet go through the data section, the stream, the judging of each block and the
features of each batch, as in training without its model; in a process of its own, whose peak the kernel counts. Two sizes
show that it does not grow with them.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mitrain.core import markdown
from mitrain.core.errors import UserError
from mitrain.core.provenance import made_with, sentence
from mitrain.data.features import Features
from mitrain.data.media import Limits
from mitrain.data.samples import BadSamples
from mitrain.data.sources import RatedConfig
from mitrain.models.encoders import encoder_of
from mitrain.models.encoders.arrays import ArrayConfig

WIDTH, FILES, GROUP = 64, 10, 1000
BUFFER, BATCH = 10_000, 256
LIMIT = 500e6
COLUMNS = ("rows", "megabytes of files", "peak above start, MB", "seconds", "rows / s", "verdict")


class StreamError(UserError):
    """An epoch holds more than the limit; everything has been written."""

    exit_code = 1


def measured(sizes: Sequence[int], command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """A row for each number of rows."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="mitrain-stream-") as folder:
            written(Path(folder), size)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows.append(pool.submit(epoch, folder).result())
        say(f"{rows[-1]['rows']} rows: {rows[-1]['peak'] / 1e6:.0f} MB, {rows[-1]['seconds']:.0f} s")
    return {"made": {"command": command, **made_with(("torch", "pyarrow"))}, "rows": rows}


def written(folder: Path, rows: int) -> None:
    import pyarrow
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    for number in range(FILES):
        count = rows // FILES
        vectors = pyarrow.FixedSizeListArray.from_arrays(rng.standard_normal(count * WIDTH).astype(np.float32), WIDTH)
        columns = {"mine": vectors, "text": ["a text"] * count, "target": rng.standard_normal(count)}
        parquet.write_table(pyarrow.table(columns), folder / f"{number}.parquet", row_group_size=GROUP)


def epoch(folder: str) -> dict[str, Any]:
    """One epoch over the files of ``folder``, in this process."""
    data = RatedConfig(root=folder, splits={"train": "*.parquet"}, inputs=("mine",), stream=BUFFER)
    encoder = encoder_of(ArrayConfig(width=WIDTH, input="mine"), None)
    files = Features({"mine": encoder}, {"mine": ["mine"]}, Path(folder), None, Limits(), BadSamples(0))
    before, start, seen, total = resident("VmRSS"), time.perf_counter(), 0, 0.0
    loader = data.stream_of(Path(folder), files.readable_in_block, BATCH, 0)
    while (draws := [draw for draw in loader.next() if draw.epoch == 0]) and len(draws) <= BATCH:
        seen += len(draws)
        total += float(files.pooled([draw.sample.inputs for draw in draws])[0].sum())
        if len(draws) < BATCH:
            break
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    seconds = time.perf_counter() - start
    return {"rows": seen, "bytes": size, "peak": resident("VmHWM") - before, "seconds": seconds, "sum": total}


def resident(name: str) -> int:
    """Bytes of this process in memory now (VmRSS), or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def table(found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        verdict = "ok" if row["peak"] <= LIMIT else f"above {LIMIT / 1e6:.0f} MB"
        shown = [f"{row['rows']:,}", f"{row['bytes'] / 1e6:.0f}", f"{row['peak'] / 1e6:.0f}", f"{row['seconds']:.0f}"]
        rows.append([*shown, f"{row['rows'] / row['seconds']:,.0f}", verdict])
    note = (
        f"Rows of {WIDTH} numbers of 32 bits, a text and a target in {FILES} Parquet files, {BUFFER:,} records in"
        f" memory at a time, batches of {BATCH}, one epoch. Limit: {LIMIT / 1e6:.0f} MB. {sentence(found['made'])}"
    )
    return "\n".join([*markdown.table(COLUMNS, rows), "", note, ""])


def check(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        if row["peak"] > LIMIT:
            raise StreamError(f"an epoch of {row['rows']} rows holds {row['peak'] / 1e6:.0f} MB, {LIMIT / 1e6:.0f} allowed")
