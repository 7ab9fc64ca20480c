"""The whole configuration of a run, section by section."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, field_validator, model_validator

import mitrain.adapters
import mitrain.data.sources
import mitrain.tasks.answer
import mitrain.tasks.classify
import mitrain.tasks.retrieve
import mitrain.tasks.segment  # noqa: F401 - importing a section's module makes its name known
from mitrain import config
from mitrain.adapters.kernels import KernelConfig
from mitrain.backbones import ModelConfig
from mitrain.config import Section
from mitrain.engine import OptimizerConfig, ZeroConfig
from mitrain.errors import ConfigError
from mitrain.features import FeatureConfig
from mitrain.schedule import ScheduleConfig
from mitrain.telemetry import WandbConfig


class TrainConfig(Section):
    """How long, how fast, and when to look.

    ``batch`` samples are one micro-batch, ``accumulate`` of them one step. ``lr`` is the adapter's, ``head_lr`` the task
    head's (none: the same); ``rates``: the peak rates of parameters whose names begin so, as {adapter.others: 5e-4}.
    ``eval_every`` and ``save_every`` are in steps; the best step is chosen on ``val`` alone.
    ``fraction``: of the training samples that are used, evenly spread. ``hang_minutes`` without a step print every
    thread's stack.
    """

    steps: int = Field(200, ge=1)
    batch: int = Field(32, ge=1, le=1 << 20)
    accumulate: int = Field(1, ge=1, le=1 << 20)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr: float = Field(1e-3, gt=0)
    head_lr: float | None = Field(None, gt=0)
    rates: dict[str, Annotated[float, Field(gt=0)]] = {}
    weight_decay: float = Field(0.0, ge=0)
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint_activations: bool = False
    eval_every: int = Field(100, ge=1)
    eval_batch: int = Field(32, ge=1, le=1 << 20)
    eval_samples: int | None = Field(None, ge=1)
    save_every: int = Field(100, ge=1)
    keep: int = Field(2, ge=1)
    fraction: float = Field(1.0, gt=0, le=1)
    log_every: int = Field(10, ge=1)
    max_skipped: int = Field(10, ge=0)
    hang_minutes: float = Field(30, ge=0, le=1e6)


class RunConfig(Section):
    """Everything that decides what a run does. Its hash names it."""

    name: str = Field("run", pattern=config.NAME)
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig
    adapter: SerializeAsAny[Section]
    features: FeatureConfig = FeatureConfig()
    task: SerializeAsAny[Section]
    data: SerializeAsAny[Section]
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    kernels: KernelConfig = KernelConfig()
    cache: bool = True
    wandb: WandbConfig = WandbConfig()

    @field_validator("adapter", "task", "data", mode="before")
    @classmethod
    def _by_name(cls, value: Any, info: Any) -> Section:
        try:
            return config.choose(info.field_name, value)
        except ConfigError as error:
            raise config.Told(error) from None

    @model_validator(mode="after")
    def _fitting(self) -> "RunConfig":
        if self.data.task != self.task.section_name:
            raise ValueError(
                f"data.name={self.data.section_name!r} serves the task {self.data.task!r}, not {self.task.section_name!r}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for key in ("adapter", "task", "data"):
            values[key] = {"name": getattr(self, key).section_name, **values[key]}
        return values

    @property
    def hash(self) -> str:
        return config.digest(self.to_dict())


def load(path: str | Path, assignments: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A run's configuration from a YAML file and ``key=value`` overrides."""
    values = config.override(config.read_file(path), assignments)
    with config.quoting(assignments):
        return from_dict(values)


SPREAD = ("zero", "kernels", "wandb", "model.device", "train.checkpoint_activations", "train.hang_minutes")
"""What decides where and how fast a run computes, and not what: it may change when a run is resumed."""


def respread(run_config: RunConfig, assignments: list[str], allow_changes: bool = False) -> RunConfig:
    """A run's own configuration with changes to what `SPREAD` names; ConfigError for others, unless ``allow_changes``."""
    for assignment in assignments:
        spread = f"{assignment.partition('=')[0]}.".startswith(tuple(f"{key}." for key in SPREAD))
        if not spread and not allow_changes:
            raise ConfigError(
                f"{assignment!r} would change what a resumed run computes: give --allow-changes too, or start a new run"
                f" (without it {', '.join(SPREAD)} may change)"
            )
    with config.quoting(assignments):
        return from_dict(config.override(run_config.to_dict(), assignments)) if assignments else run_config


def from_dict(values: dict[str, Any]) -> RunConfig:
    """A run's configuration from plain values (a resolved config.yaml, a checkpoint's state)."""
    return config.parse(RunConfig, values)
