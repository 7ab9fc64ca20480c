"""DeepSpeed's JSON from our configuration, and a user's own JSON merged into it.

DeepSpeed is told to compute in fp32 whatever ``model.dtype`` is: its bf16 and fp16 modes cast every float parameter,
and with them the steps of low-bit weights and the adapter's own fp32 weights. The frozen weights are in ``model.dtype``
already, and what is trained is fp32 (mixed precision without master copies).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mitrain.core.config import Section, read_file
from mitrain.core.errors import ConfigError
from mitrain.training.engine.base import OptimizerConfig

Json = dict[str, Any]
PERSIST = 10_000
"""Parameters of up to so many elements (norms, steps of small matrices) stay whole on every rank at stage 3: gathering
them costs more than holding them."""
DEFAULTS = {
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
}
"""DeepSpeed's own, in elements: weights that run again so soon stay gathered; so many more are fetched ahead."""

INSTEAD = {
    "train_batch_size": "set train.batch and train.accumulate",
    "train_micro_batch_size_per_gpu": "set train.batch",
    "gradient_accumulation_steps": "set train.accumulate",
    "managed_gradient_accumulation": "leave it out",
    "gradient_clipping": "set train.optimizer.clip",
    "optimizer": "set train.optimizer",
    "scheduler": "set train.schedule",
    "fp16": "set model.dtype=fp16",
    "bf16": "set model.dtype=bf16",
    "bfloat16": "set model.dtype=bf16",
    "amp": "set model.dtype",
    "torch_autocast": "set model.dtype",
    "zero_optimization.stage": "set zero.stage",
    "zero_optimization.offload_optimizer": "set zero.offload_optimizer",
    "zero_optimization.offload_param": "set zero.offload_params",
    "zero_optimization.cpu_offload": "set zero.offload_optimizer",
    "zero_optimization.stage3_module_granularity_threshold": "let modules gather their weights one by one",
    "activation_checkpointing": "set train.checkpoint_activations",
    "wandb": "set telemetry.trackers",
}
"""What in a user's JSON says what another setting of ours says, and which."""


class ZeroConfig(Section):
    """How weights and optimizer states are spread over ranks, by DeepSpeed's ZeRO.

    At ``stage`` 0 every rank holds everything, and DeepSpeed, which then has nothing to shard, is not needed. What is
    trained stays whole on every rank at all stages, and so do its gradients until they are reduced.
    """

    stage: int = Field(0, ge=0, le=3)
    offload_optimizer: bool = False
    offload_params: bool = False
    config: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fitting(self) -> "ZeroConfig":
        if self.offload_optimizer and not self.stage:
            raise ValueError(f"offload_optimizer needs stage 1, 2 or 3, not {self.stage}: set zero.stage")
        if self.offload_params and self.stage != 3:
            raise ValueError(f"offload_params needs stage 3, not {self.stage}: set zero.stage=3")
        if self.config is not None and not self.stage:
            raise ValueError("a DeepSpeed configuration needs DeepSpeed, which stage 0 does without: set zero.stage")
        return self


def deepspeed_json(zero: ZeroConfig, optimizer: OptimizerConfig, world: int) -> Json:
    """What ``deepspeed.initialize`` is given. ConfigError names what a user's JSON says otherwise than our settings."""
    made = generated(zero, optimizer, world)
    if zero.config is None:
        return made
    where, theirs = user_json(zero.config)
    check_theirs(theirs, made, where)
    return merged(made, theirs)


def generated(zero: ZeroConfig, optimizer: OptimizerConfig, world: int) -> Json:
    if optimizer.clip is not None and optimizer.clip_by == "value":
        raise ConfigError(
            f"train.optimizer.clip_by=value, but at zero.stage={zero.stage} no rank has all gradients and DeepSpeed"
            " clips their norm: set clip_by=norm or zero.stage=0"
        )
    sharding: Json = {"stage": zero.stage}
    if zero.stage == 3:
        sharding |= {"stage3_param_persistence_threshold": PERSIST}
    if zero.offload_optimizer:
        sharding["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_params:
        sharding["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": world,  # samples are counted by the engine: a "batch" of DeepSpeed is a step
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": sharding,
    }


def gather_limits(frozen: int, sizes: Json) -> Json:
    """How many of ``frozen`` elements stage 3 keeps gathered and how many it fetches ahead, unless ``sizes`` has it.

    DeepSpeed's own numbers, which are ours for 8·10⁹ elements and more, hold a smaller model whole on every rank.
    """
    share = {"stage3_max_live_parameters": 8, "stage3_max_reuse_distance": 8, "stage3_prefetch_bucket_size": 32}
    return {name: sizes.get(name, min(DEFAULTS[name], frozen // part)) for name, part in share.items()}


def own_sizes(zero: ZeroConfig) -> Json:
    """What a user's JSON says of ZeRO."""
    return merged({}, user_json(zero.config)[1]).get("zero_optimization", {}) if zero.config is not None else {}


def user_json(source: str | Mapping[str, Any]) -> tuple[str, Json]:
    """(how to name it, its content). A JSON file is read by the YAML reader, of which JSON is a part."""
    if isinstance(source, str):
        return str(Path(source)), read_file(source)
    return "zero.config", dict(source)


def check_theirs(theirs: Mapping[str, Any], ours: Json, where: str) -> None:
    """Refuse what contradicts ``ours`` or belongs to another setting; "auto" and an agreeing value are fine."""
    for path, value in flat(theirs):
        remedy = next((INSTEAD[key] for key in (path, path.rpartition(".")[0], path.split(".")[0]) if key in INSTEAD), None)
        if remedy is None or value == "auto" or (path.endswith("enabled") and value is False):
            continue
        mine = at(ours, path)
        if mine != value:
            here = "mitrain decides that" if mine is None else f"mitrain's settings make it {mine!r}"
            raise ConfigError(f"{where} sets {path}={value!r}, but {here}: leave it out and {remedy}")


def flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """[(a.b, value)] of the leaves."""
    settings = []
    for key, value in values.items():
        path = f"{before}{key}"
        settings += flat(value, f"{path}.") if isinstance(value, Mapping) and value else [(path, value)]
    return settings


def at(values: Json, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def merged(ours: Json, theirs: Mapping[str, Any]) -> Json:
    """``theirs`` over ``ours``; an "auto" leaves ours, or nothing where we have nothing."""
    result = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, Mapping):
            inside = ours.get(key)
            result[key] = merged(inside if isinstance(inside, dict) else {}, value)
        elif value != "auto":
            result[key] = value
    return result
