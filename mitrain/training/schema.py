"""The whole configuration of a run, section by section."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

import mitrain.methods  # noqa: F401 - importing a section's module makes its name known
from mitrain.core import config, glance
from mitrain.core.config import Section
from mitrain.core.errors import ConfigError
from mitrain.data.features import FeatureConfig
from mitrain.methods.kernels import KernelConfig
from mitrain.models import ModelConfig
from mitrain.models.encoders.config import inputs_of
from mitrain.tasks import TASKS
from mitrain.training.engine import OptimizerConfig, ZeroConfig
from mitrain.training.schedule import Every, ScheduleConfig
from mitrain.training.trackers import TelemetryConfig, WandbConfig

log = logging.getLogger(__name__)


class TrainConfig(Section):
    """How long, how fast, and when to look. The best step is chosen on ``val`` alone."""

    steps: int | None = Field(200, ge=1)
    epochs: float | None = Field(None, gt=0, le=1e6)
    patience: int | None = Field(None, ge=1)
    batch: int = Field(32, ge=1, le=1 << 20)
    accumulate: int = Field(1, ge=1, le=1 << 20)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr: float = Field(1e-3, gt=0)
    head_lr: float | None = Field(None, gt=0)
    rates: dict[str, Annotated[float, Field(gt=0)]] = {}
    weight_decay: float = Field(0.0, ge=0)
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint_activations: bool = False
    eval_every: Every = 100
    eval_batch: int = Field(32, ge=1, le=1 << 20)
    eval_samples: int | None = Field(None, ge=1)
    save_every: Every = 100
    keep: int = Field(2, ge=1)
    init_from: str | None = None
    fraction: float = Field(1.0, gt=0, le=1)
    permute: bool = False
    group_by_length: bool = False
    modality_dropout: float = Field(0.0, ge=0, lt=1)
    check_largest: Literal["auto", "off"] = "auto"
    log_every: int = Field(10, ge=1)
    max_skipped: int = Field(10, ge=0)
    hang_minutes: float = Field(30, ge=0, le=1e6)

    @model_validator(mode="before")
    @classmethod
    def _counted_in_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is not None:
            return {"steps": None, "eval_every": "epoch", "save_every": "epoch", **values}
        return values

    @model_validator(mode="after")
    def _of_one_length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two (the other null or left out)")
        return self


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
    telemetry: TelemetryConfig = TelemetryConfig()
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
        if not isinstance(self.data, TASKS[self.task.section_name].formats):
            fitting = " or ".join(repr(name) for name, task in TASKS.items() if isinstance(self.data, task.formats))
            raise ValueError(
                f"data.name={self.data.section_name!r} serves the task {fitting}, not {self.task.section_name!r}"
            )
        read = inputs_of(self.model.encoders)
        if self.data.takes_inputs and "inputs" not in self.data.model_fields_set and read:
            return self.model_copy(update={"data": self.data.model_copy(update={"inputs": read})})._with_inputs(read)
        return self._with_inputs(read)

    def _with_inputs(self, read: Sequence[str]) -> "RunConfig":
        """The same; ValueError where an encoder reads what no sample has."""
        if absent := [name for name in read if name not in self.data.inputs]:
            raise ValueError(
                f"model.encoders reads the input {absent[0]!r}, which data.inputs={list(self.data.inputs)} does not list:"
                " name the encoder after one of these, or set its input to one"
            )
        train = self.train
        if self.data.buffer and (train.epochs or train.fraction < 1 or "epoch" in (train.eval_every, train.save_every)):
            raise ValueError(
                "how many samples a stream has is not known: give train.steps, train.eval_every and train.save_every in"
                " steps, leave train.fraction out, or set data.stream=null"
            )
        if self.data.buffer and train.group_by_length:
            raise ValueError("train.group_by_length needs all samples at hand: leave it out, or set data.stream=null")
        if self.zero.stage == 3 and (self.data.may_lack or self.train.modality_dropout):
            # A rank whose samples lack a modality would not run that encoder's shards, and the others would wait for it.
            raise ValueError("samples may lack an input where weights are whole on each rank: set zero.stage to at most 2")
        if TASKS[self.task.section_name].searches and self.train.modality_dropout:
            raise ValueError(f"what {self.task.section_name} searches for would be lost: leave out train.modality_dropout")
        if lost := [name for name in self.data.may_lack if name not in self.data.inputs]:
            raise ValueError(f"data.may_lack names {lost[0]!r}, which is none of data.inputs={list(self.data.inputs)}")
        return self

    @model_validator(mode="after")
    def _say_what_has_no_effect(self) -> "RunConfig":
        if self.wandb.model_fields_set and "telemetry" not in self.model_fields_set:
            given = ", ".join(f"wandb.{name}" for name in sorted(self.wandb.model_fields_set))
            log.warning("nothing is logged to wandb: %s has no effect without telemetry.trackers=[wandb]", given)
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
    values = config.override(one_length(config.read_file(path), assignments), assignments)
    with config.quoting(assignments):
        return from_dict(values)


def one_length(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """``values`` without their train.steps where ``assignments`` give train.epochs in its place, and the other way round."""
    given = {key.strip() for key, _, text in (a.partition("=") for a in assignments) if text.strip() != "null"}
    train = values.get("train")
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if isinstance(train, dict) and f"train.{key}" in given and f"train.{other}" not in given:
            values = {**values, "train": {k: v for k, v in train.items() if k != other}}
    return values


def with_resume_overrides(run_config: RunConfig, assignments: list[str], allow_changes: bool = False) -> RunConfig:
    """A run's own configuration changed where `glance.RESUME_OVERRIDES` allows; ConfigError elsewhere, unless
    ``allow_changes``."""
    if not allow_changes:
        glance.resume_overrides(assignments)
    with config.quoting(assignments):
        values = one_length(run_config.to_dict(), assignments)
        return from_dict(config.override(values, assignments)) if assignments else run_config


def from_dict(values: dict[str, Any]) -> RunConfig:
    """A run's configuration from plain values (a resolved config.yaml, a checkpoint's state)."""
    return config.parse(RunConfig, values)
