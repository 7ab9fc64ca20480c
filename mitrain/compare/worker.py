"""What the process of a cell does: ``python -m mitrain.compare.worker FOLDER PARENT``, where it ends with its PARENT.

FOLDER/.held       held while it works: the process of a parent that was killed saves and goes before the next begins
FOLDER/cell.json   what is asked (`mitrain.compare.cells.Cell.to_dict`)
FOLDER/run/        the run, which an interrupted process goes on with
FOLDER/row.json    what was found, written last
"""

import base64
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from mitrain import runs, schema
from mitrain.compare import counts, measures
from mitrain.compare.processes import STOPPED, end_with
from mitrain.compare.study import TaskPart
from mitrain.config import nearest, parse
from mitrain.data.sources import limit
from mitrain.errors import ConfigError, UserError
from mitrain.evaluate import Evaluation, controlled
from mitrain.export import export
from mitrain.features import ImageFeatures
from mitrain.files import file_lock, write_json
from mitrain.floors import floors_of
from mitrain.model import settled
from mitrain.report import flatten, panels
from mitrain.runs import Run
from mitrain.scoring import score_split, split_of
from mitrain.trainer import Trainer

SIDE = 144
"""Pixels of a side of the pictures that the page shows."""


class StoppedError(UserError):
    exit_code = STOPPED


def main(folder: Path) -> int:
    asked = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    try:
        with file_lock(folder / ".held"):
            write_json(folder / "row.json", {"identity": asked["identity"], **measured(asked, folder)})
    except UserError as error:
        print(f"mitrain: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measured(asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row's numbers."""
    run_config = schema.from_dict(asked["config"])
    if asked["count"] is not None:
        return counts.count(run_config, asked["count"])
    run_folder = runs.create_or_find(settled(run_config), folder / "run")
    part = parse(TaskPart, asked["part"])
    found = trained(run_folder, part)
    return found | scored(runs.open_run(run_folder), part, asked["panels"])


def trained(folder: Path, part: TaskPart) -> dict[str, Any]:
    """Train the run to its end, from where it stands, and measure a step of it. What ``part`` asks of a split that is not
    there, or a control that the task has not, is refused before."""
    trainer = Trainer(runs.read_config(folder), folder, quiet=True)
    samples = limit(trainer.config.data.read(trainer.root, part.split), part.samples)
    for control in part.controls:
        controlled(samples, trainer.model.task.shuffles, control, 0)
    outcome = trainer.fit()
    if outcome.stopped:
        raise StoppedError(f"stopped by {outcome.stopped} after step {outcome.step}: start it again")
    return {
        **measures.parameters(trainer.model),
        **measures.of_step(trainer),
        "step_ms": measures.step_ms(folder / "metrics.jsonl"),
        "steps": outcome.step,
        "best_step": outcome.best_step,
        **exported(folder),
    }


def exported(folder: Path) -> dict[str, Any]:
    """Bytes of the adapter's exported tensors; none for a method that cannot be exported, with the reason."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            made = export(folder, Path(temporary) / "adapter")
        except UserError as error:
            return {"adapter_bytes": None, "not_exported": str(error)}
        return {"adapter_bytes": made["bytes"]}


def scored(run: Run, part: TaskPart, shown: int) -> dict[str, Any]:
    """The split's metrics, the controls' and floors' value of the same metric, and some predictions."""
    chosen, images = split_of(run, part.split, part.samples)
    plain = score_split(run, chosen, images, "none", seed=run.config.seed)
    metrics = flatten(plain.metrics)
    metric = part.metric or run.model.task.metric
    if metric not in metrics:
        raise ConfigError(
            f"metric={metric!r} is no metric of this task{nearest(metric, metrics)}: {', '.join(metrics)}"
        )
    beside = {
        name: flatten(score_split(run, chosen, images, name, seed=run.config.seed).metrics).get(metric)
        for name in part.controls
    }
    if part.floors:
        beside |= {
            name: flatten(values).get(metric) for name, values in floors_of(run, part.split, chosen, images).items()
        }
    return {
        "metric": metric,
        "value": metrics[metric],
        "metrics": metrics,
        "controls": beside,
        "panels": pictures(run, images, chosen, plain, shown),
    }


def pictures(run: Run, images: ImageFeatures, chosen: list[Any], found: Evaluation, count: int) -> list[dict[str, Any]]:
    """Predictions as JSON: the sample, a small picture in base64, the lines below it."""
    shown = panels(run, images, chosen, found, count) if count else []
    return [{"sample": s.id, "picture": small(p.picture), "lines": list(p.lines), "right": p.right} for s, p in shown]


def small(picture: Image.Image) -> str:
    """A JPEG of at most `SIDE` pixels a side, in base64."""
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    with io.BytesIO() as file:
        picture.save(file, "JPEG", quality=80)
        return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) if end_with(int(sys.argv[2])) else STOPPED)
