"""Choosing each method's settings on val before a study's own cells: successive halving with one budget for every method.

A trial is a cell like any other, kept and gone on with in OUT/search/TASK-METHOD-STEPS/results.json: a point of the axis
``steps-STEPS``. All points of the method's grid start with the fewest steps; after each rung the better half goes on, anew
and for longer. What is best after the last rung is laid over the method's settings in the study's own cells.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from mitrain.compare.cells import cell_ids, resolve
from mitrain.compare.study import Also, Axis, Search, Study
from mitrain.core import user_code
from mitrain.tasks import TASKS

Row = dict[str, Any]
LEAST = ("mae", "_rank")  # how metrics end whose lowest value is the best, where no task says it


@dataclass(frozen=True)
class Job:
    """A study from its file, and the folder of its results. ``chosen``: what its search has found; ``undecided``: tasks and
    methods whose trials are not finished, or all failed."""

    study: Study
    path: Path
    out: Path
    chosen: tuple[dict[str, Any], ...] = ()
    undecided: frozenset[tuple[str, str]] = frozenset()


Rows = Callable[[Job], Sequence[Row]]
"""Of a job's cells: measured now, or as they were kept."""


def searched(job: Job, rows: Rows) -> Job:
    """The job with the settings that its search has chosen, by the ``rows`` of the trials of one method on one task."""
    search = job.study.search
    if search is None:
        return job
    found, also, undecided = [], [], set()
    for task, method in dict.fromkeys((cell.task, cell.method) for cell in cell_ids(job.study)):
        if method not in search.space:
            continue
        best = halved(job, search, task, method, rows)
        if best:
            found.append(best)
            also.append(Also(tasks=(task,), methods=(method,), set=best["set"]))
        else:
            undecided.add((task, method))
    study = job.study.model_copy(update={"also": (*job.study.also, *also)})
    return replace(job, study=study, chosen=tuple(found), undecided=frozenset(undecided))


def halved(job: Job, search: Search, task: str, method: str, rows: Rows) -> Row | None:
    """The best point of the last rung, with what it cost to find; None where there is none."""
    points, tried = grid(search, method), []
    for steps in search.rungs:
        study, out = trials_of(job.study, task, method, steps, points), job.out / "search" / f"{task}-{method}-{steps}"
        trials = replace(job, study=study, out=out)
        found = {row["at"]: row for row in rows(trials)}
        if not all(name in found for name in points):
            return None
        tried += [found[name] for name in points]
        sign = -1 if lower_is_better(trials) else 1
        scored = [name for name in points if found[name]["value"] is not None]
        order = sorted(scored, key=lambda name: -sign * found[name]["value"])  # of equal ones the first
        if not order:
            return None
        points = {name: points[name] for name in order[: math.ceil(len(points) / 2)]}
    best = found[order[0]]
    steps = sum(int(row["axis"].partition("-")[2]) for row in tried)
    cost = {"trials": len(tried), "steps": steps, "seconds": sum(row["seconds"] for row in tried)}
    chosen = {"task": task, "method": method, "point": order[0], "set": points[order[0]]}
    return chosen | {"metric": best["metric"], "value": best["value"]} | cost


def grid(search: Search, method: str) -> dict[str, dict[str, Any]]:
    """The points that a method starts with, by their names; drawn from the search's seed where the grid has more."""
    keys, values = zip(*search.space[method].items(), strict=True)
    points = list(itertools.product(*({str(value): value for value in several}.values() for several in values)))
    if len(points) > search.trials:
        points = Random(f"{search.seed} {method}").sample(points, search.trials)
    return {
        " ".join(f"{key}={value}" for key, value in zip(keys, point, strict=True)): dict(zip(keys, point, strict=True))
        for point in points
    }


def trial_count(search: Search) -> int:
    """Of one method, over all rounds."""
    counts = [search.trials]
    for _ in search.rungs[1:]:
        counts.append(math.ceil(counts[-1] / 2))
    return sum(counts)


def trials_of(study: Study, task: str, method: str, steps: int, points: Mapping[str, dict[str, Any]]) -> Study:
    """The study of a rung's trials: on val alone, without what is shown beside a score."""
    search = study.search
    part = study.tasks[task]
    scored = {"split": "val", "samples": search.samples or part.samples, "metric": search.metric or part.metric}
    part = part.model_copy(update={**scored, "controls": (), "baselines": False, "also_on": ()})
    settings = {name: {**point, **search.set, "train.steps": steps} for name, point in points.items()}
    axis = Axis(values=tuple({"value": name, "set": own} for name, own in settings.items()))
    changes = {"tasks": {task: part}, "methods": {method: study.methods[method]}, "axes": {f"steps-{steps}": axis}}
    alone = {"plain": False, "seeds": (search.seed,), "search": None, "panels": 0, "against": None}
    return study.model_copy(update=changes | alone)


def lower_is_better(trials: Job) -> bool:
    """Of the task's own metric and of the user's it is what they say; what else a study names is judged by its name."""
    cell = resolve(trials.study, trials.path, cell_ids(trials.study)[0])
    kind, own = TASKS[cell.config.task.section_name], getattr(cell.config.task, "metric", None)
    first = getattr(kind, "metric", None)
    known = dict.fromkeys((first, None), kind.minimises)
    if own and (least := user_code.minimises(own)) is not None:
        first = own.partition(":")[2]
        known[first] = least
    asked = cell.part.metric or first
    return known[asked] if asked in known else asked.endswith(LEAST)
