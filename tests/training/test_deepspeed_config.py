"""DeepSpeed's JSON: what our settings make of it, and what a user's own may say beside them."""

import json
import subprocess
import sys

import pytest

from mitrain.core.config import parse
from mitrain.core.errors import ConfigError
from mitrain.training.engine import OptimizerConfig, ZeroConfig
from mitrain.training.engine.deepspeed_config import deepspeed_json
from mitrain.training.engine.zero import sharding

PLAIN = OptimizerConfig(clip=0.5)


def made(world: int = 2, optimizer: OptimizerConfig = PLAIN, **values) -> dict:
    return deepspeed_json(parse(ZeroConfig, values, "zero"), optimizer, world)


def test_a_step_is_one_batch_of_deepspeeds_whatever_ours_is():
    """It asserts that the three numbers fit together."""
    found = made(world=3, stage=1)
    sizes = [found[k] for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert sizes == [3, 1, 1] and found["gradient_clipping"] == 0.5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_parameter_is_cast(stage):
    """Its bf16 and fp16 modes cast the adapter's weights and the steps of low-bit ones."""
    assert not {"bf16", "fp16", "amp", "torch_autocast"} & set(made(stage=stage))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"stage": 1}, {"stage": 1}),
        ({"stage": 2, "offload_optimizer": True}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        (
            {"stage": 3, "offload_params": True},
            {"stage": 3, "stage3_param_persistence_threshold": 10_000, "offload_param": {"device": "cpu"}},
        ),
    ],
)
def test_stage_and_offload(values, expected):
    assert made(**values)["zero_optimization"] == expected


def test_no_clipping_is_zero():
    assert made(stage=1, optimizer=OptimizerConfig(clip=None))["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"stage": 4}, "zero.stage=4"),
        ({"offload_optimizer": True}, "offload_optimizer needs stage 1, 2 or 3, not 0: set zero.stage"),
        ({"stage": 2, "offload_params": True}, "offload_params needs stage 3, not 2: set zero.stage=3"),
        ({"config": {}}, "a DeepSpeed configuration needs DeepSpeed, which stage 0 does without: set zero.stage"),
    ],
)
def test_settings_that_do_not_fit(values, line):
    with pytest.raises(ConfigError, match=line):
        made(**values)


def test_values_cannot_be_clipped_where_no_rank_has_all_gradients():
    with pytest.raises(ConfigError, match=r"clip_by=value.*zero.stage=2.*set clip_by=norm or zero.stage=0"):
        made(stage=2, optimizer=OptimizerConfig(clip_by="value"))


def test_a_users_json_is_merged(tmp_path):
    own = {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 1e6, "stage": "auto"}}
    (tmp_path / "ds.json").write_text(json.dumps(own))
    for source in (own, str(tmp_path / "ds.json")):
        found = made(stage=3, config=source)
        assert found["wall_clock_breakdown"] is True
        assert found["zero_optimization"]["reduce_bucket_size"] == 1e6
        assert found["zero_optimization"]["stage"] == 3
        assert found["zero_optimization"]["stage3_param_persistence_threshold"] == 10_000


def test_a_users_json_may_say_what_our_settings_say():
    """As Hugging Face's do: "auto", equal values, and modes that are switched off."""
    own = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.5, "bf16": {"enabled": False}}
    assert made(stage=1, config=own)["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (
            {"gradient_clipping": 1.0},
            r"zero.config sets gradient_clipping=1.0, but mitrain's settings make it 0.5: .*clip",
        ),
        ({"zero_optimization": {"stage": 2}}, "sets zero_optimization.stage=2, but .* make it 3: .*set zero.stage"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "offload_param.device='nvme'.*zero.offload_params",
        ),
        (
            {"bf16": {"enabled": True}},
            "bf16.enabled=True, but mitrain decides that: leave it out and set model.dtype=bf16",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type='Adam'.*set train.optimizer"),
        ({"train_batch_size": 64}, "train_batch_size=64.*train.batch"),
        (
            {"zero_optimization": {"stage3_module_granularity_threshold": 100}},
            "granularity_threshold=100, but mitrain decides that: leave it out",
        ),
    ],
)
def test_a_users_json_that_contradicts_is_named(own, line):
    with pytest.raises(ConfigError, match=line):
        made(stage=3, config=own)


def test_without_deepspeed_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install 'mitrain\[deepspeed\]', or set zero.stage=0"):
        sharding(ZeroConfig(stage=3), PLAIN)
    assert sharding(ZeroConfig(stage=2), PLAIN) is None


def test_a_json_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"ds\.json"):
        made(stage=1, config=str(tmp_path / "ds.json"))


def test_an_engine_starts_without_torchs_compiler():
    """In a process of its own; what DeepSpeed compiles where it is defined would load it."""
    code = """
import sys, torch
from mitrain.training.engine import Group, OptimizerConfig, ZeroConfig
from mitrain.training.engine.zero import ZeroEngine
net = torch.nn.Linear(4, 4)
groups = [Group("net", dict(net.named_parameters()), 0.1)]
ZeroEngine({"net": net}, groups, lambda step: 1.0, OptimizerConfig(), ZeroConfig(stage=2))
sys.exit("torch._inductor.compile_fx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
