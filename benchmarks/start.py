"""``mitrain bench start``: seconds until training can begin, on pictures as large as COCO's and models too small to count.

The encoder has 3 layers for 28 pixels, so that what is timed is the reading, naming and decoding of pictures. Starts with an
empty and with a filled cache take turns with those of another checkout, each in a process of its own; imports are not timed.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.faults import world
from mitrain.core import markdown
from mitrain.core.errors import UserError
from mitrain.core.provenance import made_with, sentence

HERE = Path(__file__).parents[1]
SIZE = (640, 480)
LIMIT_S = 3600.0
BEFORE, AFTER = "before", "after"
COLUMNS = ("cache", "before s", "after s", "before / after")
CHILD = """
import sys, time
from pathlib import Path
try:
    from mitrain.training import schema
    from mitrain.training.trainer import Trainer
except ImportError:  # the layout of earlier versions
    from mitrain import schema
    from mitrain.trainer import Trainer
config = schema.load(sys.argv[1])
start = time.perf_counter()
Trainer(config, Path(), quiet=True)
print("seconds", time.perf_counter() - start)
"""


def measured(pictures: int, runs: int, before: str | None, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Seconds of ``runs`` starts of each kind; ``before``: a checkout of another commit."""
    trees = ({BEFORE: Path(before)} if before else {}) | {AFTER: HERE}
    seconds: dict[str, dict[str, list[float]]] = {tree: {"empty": [], "filled": []} for tree in trees}
    with tempfile.TemporaryDirectory(prefix="mitrain-start-") as temporary:
        config = make(Path(temporary), pictures)
        for run in range(runs):
            for name, tree in trees.items():
                for cache in ("empty", "filled"):
                    taken = start(tree, config, Path(temporary) / f"cache-{name}-{run}")
                    seconds[name][cache].append(taken)
                    say(f"{name}, cache {cache}: {taken:.2f} s")
    made = {"command": command, **made_with(("torch", "pillow"))}
    commits = {name: commit_of(tree) for name, tree in trees.items()}
    return {"made": made, "commits": commits, "pictures": pictures, "cores": os.cpu_count(), "seconds": seconds}


def make(path: Path, pictures: int) -> Path:
    """Models, ``pictures`` and a configuration under ``path``."""
    world.language_model(path / "llm")
    world.image_encoder(path / "vision")
    world.records(path / "data", {"train": pictures - pictures // 10, "val": pictures // 10})
    for number, file in enumerate(sorted((path / "data" / "images").iterdir())):
        coarse = np.random.default_rng(number).integers(0, 255, (60, 80, 3), np.uint8)
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(file, format="JPEG", quality=90)
        os.utime(file, (1e9, 1e9))
    values = world.configuration(path) | {"features": {"views": 1}}
    (path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return path / "config.yaml"


def start(tree: Path, config: Path, cache: Path) -> float:
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}", "MITRAIN_CACHE": str(cache)}
    words = [sys.executable, "-c", CHILD, str(config)]
    ended = subprocess.run(words, env=env, cwd=tree, capture_output=True, text=True, timeout=LIMIT_S)
    if ended.returncode:
        raise UserError(f"{tree} did not start: {ended.stderr.strip().splitlines()[-1][:300]}")
    return float(ended.stdout.split()[-1])


def commit_of(tree: Path) -> str:
    found = subprocess.run(["git", "-C", str(tree), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def table(found: dict[str, Any]) -> str:
    rows = []
    for cache in ("empty", "filled"):
        medians = {name: statistics.median(kinds[cache]) for name, kinds in found["seconds"].items()}
        shown = [f"{medians[name]:.2f}" if name in medians else "–" for name in (BEFORE, AFTER)]
        ratio = f"{medians[BEFORE] / medians[AFTER]:.1f}" if BEFORE in medians else "–"
        rows.append([cache, *shown, ratio])
    commits = ", ".join(f"{name} {commit}" for name, commit in found["commits"].items())
    runs = len(found["seconds"][AFTER]["empty"])
    note = (
        f"Medians of {runs} starts each, taken in turns, of {found['pictures']} JPEG pictures of {SIZE[0]} x {SIZE[1]} with"
        f" tiny models, imports left out, {found['cores']} cores, not idle. Commits: {commits}. {sentence(found['made'])}"
    )
    return "\n".join([*markdown.table(COLUMNS, rows), "", note, ""])
