"""``mitrain bench data``: what a number of rows costs before the first step, in processor seconds and in memory.

Rows of a text of their own, a label and one of a hundredth as many small pictures, in JSONL, with tiny models: what is timed
is what grows with the rows. Each number has a process of its own; a start is all that is before a run's first step, imports
left out, with an empty cache and with the one that the first start filled. The texts run through all layers, so that no
states of theirs are kept; `start` measures large pictures.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import ranks
from benchmarks.faults import world
from benchmarks.stream import resident
from mitrain.core import markdown
from mitrain.core.files import write_json
from mitrain.core.provenance import made_with, sentence
from mitrain.data.encoded import InputFeatures
from mitrain.data.formats.captions import read_captions
from mitrain.models import loading
from mitrain.tasks import controls
from mitrain.training import schema
from mitrain.training.setup import Setup

LIMIT_S = 7200.0
SHARED = 100  # rows of a picture
CONTROLLED = 100_000  # rows for which negative controls are timed: they are for a split that is scored
PARTS = {
    "read": "manifest",
    "captions": "as captions",
    "tokens": "tokenising 10,000",
    "named": "naming pictures",
    "known": "… from the index",
    "files_control": "other files",
    "expressions_control": "other expressions",
    "shuffle": "a shuffle",
}
COLUMNS = ("rows", *(f"{name} s" for name in PARTS.values()), "a batch ms", "bytes a row")
STARTS = ("rows", "start, empty cache s", "of it encoding s", "start, filled cache s", "peak MB", "above the models MB")


def measured(sizes: Sequence[int], command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """A row for each number of rows."""
    rows = []
    for size in sizes:
        with TemporaryDirectory(prefix="mitrain-data-") as folder:
            made(Path(folder), size)
            row = {"rows": size, **ranks.found(parts, (folder, size), 1, LIMIT_S)}
            row["starts"] = [ranks.found(start, (folder,), 1, LIMIT_S) for _ in ("empty", "filled")]
        rows.append(row)
        say(f"{size:,} rows: read in {row['read']:.2f} s, started in {row['starts'][1]['seconds']:.2f} s")
    return {"made": {"command": command, **made_with(("torch", "pillow"))}, "rows": rows}


def made(folder: Path, rows: int) -> None:
    """Models, pictures and a configuration."""
    with loading.quiet():
        world.language_model(folder / "llm")
        world.image_encoder(folder / "vision")
    (folder / "data" / "images").mkdir(parents=True)
    pictures = max(8, rows // SHARED)
    for number in range(pictures):
        world.picture(list(world.COLOURS)[number % 4], number).save(folder / "data" / "images" / f"{number}.png")
    for split, count in {"train": rows, "val": 64}.items():
        with open(folder / "data" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row_of(number, pictures))}\n" for number in range(count))
    values = {
        **world.configuration(folder),
        "adapter": {"name": "mit", "layers": [0, 1, 2]},
        "features": {"views": 1},
        "task": {"name": "classify"},
        "data": {"name": "labelled", "root": str(folder / "data"), "classes": [f"kind {k}" for k in range(10)]},
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def row_of(number: int, pictures: int) -> dict[str, str]:
    words, rest = [], number
    for _ in range(6):
        rest, word = divmod(rest, len(world.WORDS))
        words.append(world.WORDS[word])
    picture = f"images/{number % pictures}.png"
    return {"id": f"row{number}", "image": picture, "text": " ".join(words), "label": f"kind {number % 10}"}


def configured(folder: Path) -> schema.RunConfig:
    return schema.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def parts(folder: str, rows: int, out: Path) -> None:
    """Processor seconds of each part by itself, in this process."""
    torch.set_num_threads(1)
    config, root, took = configured(Path(folder)), Path(folder) / "data", {}
    setup = Setup(config.model_copy(update={"data": config.data.model_copy(update={"splits": SMALL})}), Path(), quiet=True)
    gc.collect()
    before = resident("VmRSS")

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        took[name] = time.process_time() - begun

    with timed("read"):
        samples = config.data.read(root, "train")
    gc.collect()
    took["row_bytes"] = (resident("VmRSS") - before) / rows
    with timed("captions"):
        read_captions(root / "train.jsonl")
    with timed("tokens"):
        setup.model.task.tokens(samples[:10_000])
    files = [sample.inputs["image"] for sample in samples]
    for name in ("named", "known"):
        features = setup.model.features(root, cached=True)
        features.groups[0][1].index.path = Path(folder) / "names"
        with timed(name):
            features.groups[0][1].usable(files)
    objects = [sample.labels[0] for sample in samples]
    if rows <= CONTROLLED:
        with timed("files_control"):
            controls.other_files(range(rows), [name < "kind 5" for name in objects])
        with timed("expressions_control"):
            controls.other_expressions([sample.text for sample in samples], objects, [i // 2 for i in range(rows)])
    setup.train, setup.features = samples, features
    with timed("shuffle"):
        loader = setup._loader()
    with timed("batch"):
        for _ in range(20):
            setup.model.training_batch(loader.next(), features)
    took["batch_ms"] = 1e3 * took.pop("batch") / 20
    write_json(out, took)


SMALL = {"train": "val.jsonl", "val": "val.jsonl"}


def start(folder: str, out: Path) -> None:
    """Processor seconds and peak memory of a start."""
    import os

    os.environ["MITRAIN_CACHE"] = str(Path(folder) / "cache")
    torch.set_num_threads(1)
    config, before, encoding = configured(Path(folder)), resident("VmRSS"), [0.0]

    def prepare(*arguments: Any, prepare: Callable[..., int] = InputFeatures.prepare) -> int:
        begun = time.process_time()
        made = prepare(*arguments)
        encoding[0] += time.process_time() - begun
        return made

    with patch.object(InputFeatures, "prepare", prepare):
        begun = time.process_time()
        Setup(config, Path(), quiet=True)
        seconds = time.process_time() - begun
    memory = {"peak": resident("VmHWM"), "above": resident("VmHWM") - before}
    write_json(out, {"seconds": seconds, "encoding": encoding[0], **memory})


def table(found: dict[str, Any]) -> str:
    rows, starts = [], []
    for row in found["rows"]:
        seconds = [f"{row[name]:.2f}" if name in row else "–" for name in PARTS]
        rows.append([f"{row['rows']:,}", *seconds, f"{row['batch_ms']:.1f}", f"{row['row_bytes']:,.0f}"])
        empty, filled = row["starts"]
        memory = [f"{filled[name] / 1e6:,.0f}" for name in ("peak", "above")]
        seconds = [f"{took:.2f}" for took in (empty["seconds"], empty["encoding"], filled["seconds"])]
        starts.append([f"{row['rows']:,}", *seconds, *memory])
    note = (
        f"Seconds of a processor. Rows with a text each and a picture to {SHARED} of them, batches of 6 samples. A start is"
        f" all that is before the first step, imports left out. {sentence(found['made'])}"
    )
    return "\n".join([*markdown.table(COLUMNS, rows), "", *markdown.table(STARTS, starts), "", note, ""])
