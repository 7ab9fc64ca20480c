"""The cells of a study: a method on a task, at a point of an axis or at none, with a seed; and the configuration of each."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mitrain.compare.study import Also, Axis, Study, TaskPart, as_mapping, laid_over
from mitrain.core import config
from mitrain.core.config import digest, nearest
from mitrain.core.errors import ConfigError
from mitrain.core.provenance import versions
from mitrain.core.version import __version__
from mitrain.training import schema
from mitrain.training.schema import RunConfig

FORMAT = 1
"""To be raised when a cell measures something else than before: kept rows are then measured again."""
MATTERS = ("torch", "transformers")
"""Packages whose version is part of what a row was measured with; mitrain's own is as well."""


@dataclass(frozen=True)
class CellId:
    """Where a cell stands in a study; ``axis`` None: at none. A counted cell has no seed."""

    task: str
    method: str
    axis: str | None = None
    at: Any = None
    seed: int | None = None

    @property
    def name(self) -> str:
        point = f"{self.axis}-{self.at}" if self.axis else ""
        seed = "" if self.seed is None else f"seed{self.seed}"
        text = "-".join(filter(None, [self.task, self.method, point, seed]))
        return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)

    def key(self) -> str:
        """The same for equal cells, also of one that was read from JSON."""
        return digest(asdict(self))

    def named_by(self, words: Collection[str]) -> bool:
        """Whether one of ``words`` is its task, method or axis, or how its name begins; no words name all."""
        own = (self.task, self.method, self.axis)
        return not words or any(word in own or self.name.startswith(word) for word in words)

    @classmethod
    def of(cls, row: dict[str, Any]) -> "CellId":
        return cls(**{name: row[name] for name in ("task", "method", "axis", "at", "seed")})


@dataclass(frozen=True)
class Cell:
    """A cell and what is computed in it. ``count``: options of a counted cell, else None."""

    id: CellId
    config: RunConfig
    part: TaskPart
    reduced: str | None = None
    panels: int = 0
    count: dict[str, Any] | None = None
    made: dict[str, str] = field(default_factory=lambda: measured_with())

    @property
    def digest(self) -> str:
        """Names what is computed, whatever computes it."""
        values = as_measured(minimal(self.config))
        for key in ("name", "telemetry", "wandb"):
            values.pop(key, None)
        asked = {} if self.count is not None else self.part.model_dump(exclude={"config", "set"}, mode="json")
        if not asked.get("also_on"):  # kept rows were measured before there was such a thing
            asked.pop("also_on", None)
        if "baselines" in asked:  # kept rows were measured when these were called so
            asked["floors"] = asked.pop("baselines")
            asked["controls"] = ["no-image" if name == "other-inputs" else name for name in asked["controls"]]
        return digest({"format": FORMAT, "config": values, "asked": asked, "count": self.count})

    @property
    def identity(self) -> str:
        """What a kept row must have been measured for, and with, to be taken over."""
        return digest([self.digest, self.made])

    def to_dict(self) -> dict[str, Any]:
        """What the process of the cell is handed."""
        return {
            "identity": self.identity,
            "cell": asdict(self.id),
            "config": self.config.to_dict(),
            "part": self.part.to_dict(),
            "panels": self.panels,
            "count": self.count,
        }


@cache  # reading a package's metadata takes milliseconds, and every cell asks
def measured_with() -> dict[str, str]:
    return {"mitrain": __version__, **versions(MATTERS)}


def minimal(run_config: RunConfig) -> dict[str, Any]:
    """A resolved configuration without what is at its default, so that a new setting changes no older digest."""
    values = run_config.model_dump(mode="json", exclude_defaults=True)
    for key in ("adapter", "task", "data"):
        values[key] = {"name": getattr(run_config, key).section_name, **values.get(key, {})}
    return values


def as_measured(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration in the words of kept rows, where they have words for it: a list of encoders of one picture."""
    encoders = values["model"]["encoders"]
    if any(part["input"] != "image" or part.get("joins", "image") != "image" for part in encoders.values()):
        return values
    vision = [{key: part[key] for key in part if key not in ("input", "joins")} for part in encoders.values()]
    model = {key: value for key, value in values["model"].items() if key != "encoders"}
    return {**values, "model": {**model, "vision": vision}}


def cell_ids(study: Study, seeds: Sequence[int] | None = None) -> list[CellId]:
    """All cells of a study, as the table has them: by task and method, those of no axis first."""
    return list(ordered(study, study.seeds if seeds is None else seeds))


def ordered(study: Study, seeds: Sequence[int]) -> Iterator[CellId]:
    for task in study.tasks:
        for method in study.methods:
            for axis, at in points(study, task, method):
                if any(also.leave_out for also in changes(study, CellId(task, method, axis))):
                    continue
                for seed in [None] if study.kind == "count" else seeds:
                    yield CellId(task, method, axis, at, seed)


def points(study: Study, task: str, method: str) -> list[tuple[str | None, Any]]:
    axis_points: list[tuple[str | None, Any]] = [(None, None)] if study.plain else []
    for name, axis in study.axes.items():
        if method in (axis.methods or study.methods) and task in (axis.tasks or study.tasks):
            axis_points += [(name, value_and_settings(item)[0]) for item in axis.values]
    return axis_points


def value_and_settings(item: Any) -> tuple[Any, dict[str, Any]]:
    """A point of an axis: its value, and the settings it has beside the axis' keys."""
    if isinstance(item, dict) and "value" in item and set(item) <= {"value", "set"}:
        try:
            return item["value"], as_mapping(item.get("set", {}))
        except ValueError as error:
            raise ConfigError(f"the point {item['value']!r} of an axis: {error}") from None
    return item, {}


def changes(study: Study, cell_id: CellId) -> list[Also]:
    return [also for also in study.also if also.meets(cell_id.task, cell_id.method, cell_id.axis)]


def resolve(study: Study, path: str | Path, cell_id: CellId) -> Cell:
    """The cell ``cell_id``; ConfigError, which names both, where its configuration does not parse."""
    try:
        return resolved(study, Path(path).parent, cell_id)
    except ConfigError as error:
        raise ConfigError(f"{path}: the cell {cell_id.name}: {error}") from None


def resolved(study: Study, folder: Path, cell_id: CellId) -> Cell:
    part, also = study.tasks[cell_id.task], changes(study, cell_id)
    values = config.read_file(folder / part.config)
    layers = [study.set, part.set, study.methods[cell_id.method], *(entry.set for entry in also)]
    if cell_id.axis is not None:
        layers.append(at_point(study.axes[cell_id.axis], cell_id.at))
    for layer in layers:
        values = laid_over(values, layer)
    options = values.pop("count", {})
    if study.kind == "train" and options:
        raise ConfigError("count.… are options of counted cells: the study needs kind: count")
    values |= {"name": run_name(study.name, cell_id), "seed": cell_id.seed or 0}
    reduced = next((entry.reduced for entry in also if entry.reduced), study.reduced)
    counted = options if study.kind == "count" else None
    panels = study.panels if cell_id.axis is None and cell_id.seed is not None else 0
    return Cell(cell_id, schema.from_dict(values), part, reduced, panels, counted)


def run_name(study: str, cell_id: CellId) -> str:
    """At most the 64 characters that a run's name may have."""
    return f"{study}-{cell_id.name}".replace("+", "_")[:64]


def at_point(axis: Axis, at: Any) -> dict[str, Any]:
    settings: dict[str, Any] = axis.set
    for item in axis.values:
        value, own = value_and_settings(item)
        if digest(value) == digest(at):
            settings = laid_over(settings, own)
    return laid_over(settings, as_mapping(dict.fromkeys(axis.keys, at)))


def chosen(study: Study, words: Sequence[str], seeds: Sequence[int] | None = None) -> list[CellId]:
    """The cells that ``words`` name (`CellId.named_by`); ConfigError for a word that names none."""
    ids = cell_ids(study, seeds)
    known = {*study.tasks, *study.methods, *study.axes}
    for word in words:
        if not any(cell_id.named_by([word]) for cell_id in ids):
            raise ConfigError(
                f"--only {word} names no cell{nearest(word, known)}: give tasks, methods, axes or the beginning of a name"
            )
    return [cell_id for cell_id in ids if cell_id.named_by(words)]
