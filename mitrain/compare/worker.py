"""What the process of a cell does: ``python -m mitrain.compare.worker FOLDER PARENT``, where it ends with its PARENT.

FOLDER/.held       held while it works: the process of a parent that was killed saves and goes before the next begins
FOLDER/cell.json   what is asked (`mitrain.compare.cells.Cell.to_dict`)
FOLDER/run/        the run, which an interrupted process goes on with
FOLDER/../../baselines/  of each task, computed once for all of its cells
FOLDER/predictions.png    a sheet of what the run says of some samples
FOLDER/row.json    what was found, written last
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mitrain.compare import counts, intervals, measures
from mitrain.compare.cells import measured_with
from mitrain.compare.processes import end_with
from mitrain.compare.study import TaskPart
from mitrain.core.config import digest, nearest, parse
from mitrain.core.errors import PREEMPTED, ConfigError, UserError
from mitrain.core.files import file_lock, write_atomic, write_json
from mitrain.data.sources import limit
from mitrain.data.splitting import related
from mitrain.inference.export import export
from mitrain.inference.report import figure, flatten
from mitrain.inference.scoring import score_split, split_of
from mitrain.training import runs, schema
from mitrain.training.baselines import baselines_of
from mitrain.training.build import resolved
from mitrain.training.evaluate import Evaluation, controlled
from mitrain.training.runs import Run
from mitrain.training.trainer import Trainer


class StoppedError(UserError):
    exit_code = PREEMPTED


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
    run_folder = runs.create_or_find(resolved(run_config), folder / "run")
    part = parse(TaskPart, asked["part"])
    numbers = trained(run_folder, part)
    return numbers | scored(runs.open_run(run_folder), part, asked["panels"], folder)


def trained(folder: Path, part: TaskPart) -> dict[str, Any]:
    """Train the run to its end, from where it stands, and measure a step of it. What ``part`` asks of a split that is not
    there, or a control that the task has not, is refused before."""
    trainer = Trainer(runs.read_config(folder), folder, quiet=True)
    samples = limit(trainer.config.data.read(trainer.root, part.split), part.samples)
    for name in part.also_on:
        trainer.config.data.read(trainer.root, name)
    for control in part.controls:
        controlled(samples, trainer.model.task.shuffles, control, 0)
    outcome = trainer.fit()
    if outcome.stopped:
        raise StoppedError(f"stopped by {outcome.stopped} after step {outcome.step}: start it again")
    return {
        **measures.parameters(trainer.model),
        **measures.of_step(trainer),
        "step_ms": measures.step_ms(folder),
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


def scored(run: Run, part: TaskPart, shown: int, folder: Path) -> dict[str, Any]:
    """The split's metrics, the controls' and baselines' value of the same metric; predictions are drawn in ``folder``."""
    chosen, files = split_of(run, part.split, part.samples)
    plain = score_split(run, chosen, files, "none", seed=run.config.seed)
    metrics = flatten(plain.metrics)
    metric = part.metric or run.model.task.metric
    if metric not in metrics:
        raise ConfigError(f"metric={metric!r} is no metric of this task{nearest(metric, metrics)}: {', '.join(metrics)}")
    beside, under = {}, {}
    for name in part.controls:
        one = score_split(run, chosen, files, name, seed=run.config.seed)
        beside[name] = flatten(one.metrics).get(metric)
        if counted := outcomes(run, chosen, one, metric):
            under[name] = counted
    if part.baselines:
        kept = folder.parent.parent / "baselines"
        beside |= {name: values.get(metric) for name, values in baselines(run, part, kept).items()}
    for name in part.also_on:
        others = split_of(run, name, part.samples)
        beside[f"on {name}"] = flatten(score_split(run, *others, "none", seed=run.config.seed).metrics).get(metric)
    if shown:
        write_atomic(folder / "predictions.png", figure(run, files, chosen, plain, shown))
    found = {"metric": metric, "value": metrics[metric], "metrics": metrics, "controls": beside}
    own = outcomes(run, chosen, plain, metric)
    return found | ({"outcomes": own} if own else {}) | ({"control_outcomes": under} if under else {})


def outcomes(run: Run, samples: Sequence[Any], found: Evaluation, metric: str) -> dict[str, str] | None:
    """What each of the ``samples`` counts in ``metric``, where it is a mean over them."""
    value = flatten(found.metrics).get(metric)
    each = run.model.task.each(found.predictions, metric)
    return None if value is None else intervals.kept([s.id for s in samples], each, value, related(samples))


def baselines(run: Run, part: TaskPart, folder: Path) -> dict[str, dict[str, float]]:
    """The task's baselines on the split, which know neither method nor seed and are computed once for a study's cells."""
    config = run.config
    asked = [section.to_dict() for section in (config.model, config.features, config.task, config.data)]
    path = folder / f"{digest([*asked, config.train.fraction, part.split, part.samples, measured_with()])}.json"
    if not path.exists():
        found = baselines_of(run, part.split, *split_of(run, part.split, part.samples))
        folder.mkdir(exist_ok=True)
        write_json(path, {name: flatten(values) for name, values in found.items()})
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) if end_with(int(sys.argv[2])) else PREEMPTED)
