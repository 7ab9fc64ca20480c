"""A study: which methods are compared on which tasks, at which points of which axes, with which seeds.

    name: fusion                          # names the results' folder
    tasks:
      classify: {config: ../classify-tuxpaint.yaml, metric: accuracy, set: {train: {steps: 60}}}
    methods:                              # name → what it changes of the task's configuration
      mit: {}
      none: {adapter: {name: none}}       # a section of another name replaces the configuration's whole
      mit-no-gate: [adapter.gate=none]    # or as on the command line
    axes:                                 # one at a time; every other setting stays the method's own
      layers: {keys: [adapter.layers], values: [28-29, 20-29], methods: [mit]}
    seeds: [0, 1, 2]
    limit_s: 240

Paths are relative to the study's file.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mitrain.core import config
from mitrain.core.config import NAME, Section, nearest
from mitrain.core.errors import ConfigError
from mitrain.training.evaluate import Control

CONTROLS: tuple[Control, ...] = ("other-inputs", "shuffle")


def as_mapping(value: Any) -> dict[str, Any]:
    """Overrides as a nested mapping, from one with dotted keys or from ``key=value`` texts."""
    try:
        if isinstance(value, Mapping):
            return nested(value)
        if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
            return config.override({}, value)
    except ConfigError as error:
        raise config.Told(error) from None
    raise ValueError("overrides are a mapping of keys to values, or a list of key=value texts")


def nested(value: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} → {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        made: Any = nested(item) if isinstance(item, Mapping) else item
        for part in reversed(str(key).split(".")):
            made = {part: made}
        out = laid_over(out, made)
    return out


def laid_over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, key by key into the depth."""
    return {**base, **{key: changed(base.get(key), item) for key, item in changes.items()}}


def changed(base: Any, item: Any) -> Any:
    """What is given another ``name`` or ``model_type`` is replaced whole; of a list, {"0": …} changes the first item."""
    if isinstance(base, list | tuple) and isinstance(item, Mapping) and all(str(key).isdigit() for key in item):
        if max(map(int, item)) >= len(base):
            raise ConfigError(f"a list of {len(base)} has no item {max(map(int, item))}: count from 0")
        return [changed(old, item[str(i)]) if str(i) in item else old for i, old in enumerate(base)]
    if not isinstance(base, Mapping) or not isinstance(item, Mapping):
        return item
    other = any(item.get(key, base.get(key)) != base.get(key) for key in ("name", "model_type"))
    return dict(item) if other else laid_over(base, item)


Overrides = Annotated[dict[str, Any], BeforeValidator(as_mapping)]


class TaskPart(Section):
    """A task: its base configuration, and what is asked of a finished run.

    ``metric``: which number of the split's metrics a row's value is (none: the task's own). ``split``: val,
    which choices are made on; a study that reports what was chosen asks for test, once. ``samples``: of the split, evenly
    spread. ``controls``: which of the task's are scored beside it; ``baselines``: whether its baselines are;
    ``also_on``: further splits that are.
    """

    config: str = Field(min_length=1)
    metric: str | None = None
    split: str = "val"
    samples: int | None = Field(None, ge=1)
    controls: tuple[Control, ...] = CONTROLS
    baselines: bool = True
    also_on: tuple[str, ...] = ()
    set: Overrides = {}


class Axis(Section):
    """What is varied: every one of ``keys`` is set to each of ``values``, with ``set`` beside it.

    ``methods`` and ``tasks``: for which (none named: all). A key that begins with ``count.`` is an option of a counted
    cell. Each of ``values`` may be {value: …, set: …}, where a point needs settings of its own; then ``keys`` may be left
    out.
    """

    keys: tuple[str, ...] = ()
    values: tuple[Any, ...] = Field(min_length=1)
    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    set: Overrides = {}

    @model_validator(mode="after")
    def _points(self) -> "Axis":
        own = [isinstance(item, Mapping) and set(item) == {"value", "set"} for item in self.values]
        if not self.keys and not all(own):
            raise ValueError("an axis without keys changes nothing: name keys, or give each value as {value: …, set: …}")
        known = [item["value"] if isinstance(item, Mapping) and "value" in item else item for item in self.values]
        for number, value in enumerate(known):
            if any(same(value, other) for other in known[:number]):
                raise ValueError(f"the point {value!r} stands twice: remove one")
        return self


class Also(Section):
    """Changes for some cells: those of the named ``methods``, ``tasks`` and ``axis`` (none named: all)."""

    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    axis: str | None = None
    set: Overrides = {}
    reduced: str | None = None
    leave_out: bool = False

    def meets(self, task: str, method: str, axis: str | None) -> bool:
        named = (not self.methods or method in self.methods) and (not self.tasks or task in self.tasks)
        return named and self.axis in (None, axis)


class Search(Section):
    """How methods' settings are chosen on val (`mitrain.compare.search`).

    ``space``: of each method a grid, key → values, of which ``trials`` points are tried; ``rungs``: the training steps of
    each round, after which the better half goes on; ``set``: overrides of trials alone; ``samples``: of val that a trial is
    scored on (none: as many as of the task's split); ``metric``: which of its scores decides (none: the task's); ``seed``:
    theirs, and of what is drawn of a larger grid. A method without a grid is run as it is.
    """

    space: dict[str, dict[str, tuple[Any, ...]]]
    rungs: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    trials: int = Field(8, ge=2)
    samples: int | None = Field(None, ge=1)
    metric: str | None = None
    seed: int = Field(0, ge=0, lt=2**31)
    set: Overrides = {}

    @model_validator(mode="after")
    def _one_budget(self) -> "Search":
        for method, values in self.space.items():
            points = math.prod(len(set(map(str, item))) for item in values.values())
            if not values or points < self.trials:
                raise ValueError(
                    f"the grid of {method} has {points if values else 0} points, fewer than trials={self.trials}: every"
                    " method is given the same budget, so give it more values or lower trials"
                )
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs={list(self.rungs)} must rise: each is for longer than the one before")
        return self


class Study(Section):
    """See the module. ``kind: count`` builds models without weights and counts; seeds do not matter then.

    ``plain``: whether each method is also run as it is, at no axis' point. ``set``: overrides for all cells. ``reduced``:
    a remark that marks all rows as measured at reduced size. ``panels``: predictions on a method's sheet. ``against``: the
    method that the table has every other's difference from. ``search``: how settings are chosen before.
    """

    name: str = Field(pattern=NAME)
    title: str = ""
    kind: Literal["train", "count"] = "train"
    tasks: dict[str, TaskPart] = {}
    methods: dict[str, Overrides] = {}
    axes: dict[str, Axis] = {}
    plain: bool = True
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0, 1, 2), min_length=1)
    set: Overrides = {}
    also: tuple[Also, ...] = ()
    limit_s: float = Field(240, gt=0)
    panels: int = Field(8, ge=0, le=64)
    reduced: str | None = None
    against: str | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _names(self) -> "Study":
        if not (self.tasks and self.methods):
            raise ValueError("a study needs tasks and methods")
        for name in (*self.tasks, *self.methods, *self.axes):
            if not name.replace("-", "").replace("_", "").replace(".", "").replace("+", "").isalnum():
                raise ValueError(f"{name!r} cannot name a task, method or axis: take letters, digits and -._+")
        for where, part in [*self.axes.items(), *((f"also[{i}]", a) for i, a in enumerate(self.also))]:
            check_known(where, "method", part.methods, self.methods)
            check_known(where, "task", part.tasks, self.tasks)
        check_known("search", "method", list(self.search.space) if self.search else [], self.methods)
        if self.search and self.kind == "count":
            raise ValueError("a counted study has nothing to search for: leave search out")
        check_known("against", "method", [self.against] if self.against else [], self.methods)
        check_known("also", "axis", [a.axis for a in self.also if a.axis], self.axes)
        twice = next((seed for i, seed in enumerate(self.seeds) if seed in self.seeds[:i]), None)
        if twice is not None:
            raise ValueError(f"the seed {twice} stands twice: remove one")
        return self


def check_known(where: str, what: str, given: Sequence[str], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where} names the {what} {name!r}{nearest(name, known)}, which the study has not")


def read(path: str | Path) -> Study:
    """A study's file; ConfigError, which names the file, for the first thing that is wrong."""
    values = config.read_file(path)
    try:
        return config.parse(Study, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def same(one: Any, other: Any) -> bool:
    """Whether two points of an axis are the same value, however JSON or YAML write it."""
    return json.dumps(one, sort_keys=True, default=str) == json.dumps(other, sort_keys=True, default=str)
