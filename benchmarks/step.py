"""``mitrain bench step``: what a training step of a configuration takes, without evaluation and without writing.

Times are those of this machine, idle or not; bytes and operations are counted on tensors and are the same on every machine.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ranks
from mitrain.compare import measures
from mitrain.core import markdown
from mitrain.core.files import write_json
from mitrain.core.provenance import made_with, sentence
from mitrain.training import schema
from mitrain.training.build import resolved
from mitrain.training.trainer import Trainer

WARM_UP = 2
"""Steps before those that are timed: the first ones allocate and compile."""
LIMIT_S = 3600.0
COLUMNS = (
    "configuration",
    "batch",
    "step ms (20–80 %)",
    "input %",
    "saved MiB",
    "peak MiB",
    "GFLOP/sample",
    "trainable",
    "loss",
)


def measured(configs: Sequence[str], steps: int, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """A row per configuration's file."""
    rows = []
    for path in configs:
        schema.load(path)  # a mistake in it is told before anything is measured
    for path in configs:
        rows.append({"config": path, **ranks.found(work, (path, steps), 1, LIMIT_S)})
        say(f"{path}: {rows[-1]['step_ms']:.1f} ms a step")
    return {"made": {"command": command, **made_with(("torch", "transformers"))}, "steps": steps, "rows": rows}


def work(path: str, steps: int, out: Path) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(resolved(schema.load(path)), Path(), quiet=True)
    taken = [trainer._step() for _ in range(WARM_UP)]
    trainer.pace.clear()
    taken += [trainer._step() for _ in range(steps)]
    times = sorted(1e3 * seconds for _, seconds in taken[WARM_UP:])
    found = {
        "losses": [result.loss for result, _ in taken],
        "step_ms": statistics.median(times),
        "q20_ms": times[len(times) // 5],
        "q80_ms": times[-1 - len(times) // 5],
        "input_ms": 1e3 * trainer.pace.spent["input"] / steps,
    }
    write_json(out, found | measures.parameters(trainer.model) | measures.of_step(trainer))


def table(found: dict[str, Any]) -> str:
    rows = [
        [
            markdown.code(row["config"]),
            str(row["batch"]),
            f"{row['step_ms']:.1f} ({row['q20_ms']:.1f}–{row['q80_ms']:.1f})",
            f"{100 * row['input_ms'] / row['step_ms']:.2f}",
            f"{row['saved_bytes'] / 2**20:,.1f}",
            f"{row['peak_bytes'] / 2**20:,.1f}",
            f"{row['flops_per_sample'] / 1e9:.3g}",
            f"{row['trainable_parameters']:,}",
            f"{row['losses'][-1]:.6f}",
        ]
        for row in found["rows"]
    ]
    note = (
        f"Median of {found['steps']} steps after {WARM_UP}, one thread; input: waiting for samples and their features."
        f" {sentence(found['made'])}"
    )
    return "\n".join([*markdown.table(COLUMNS, rows), "", note, ""])
