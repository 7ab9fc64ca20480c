"""What the parity matrix counts, on a tiny model: bytes by storages, and two ranks end to end."""

import pytest
import torch
import yaml
from ranks import make_world
from torch import nn

from benchmarks.parity import cells
from benchmarks.parity import run as parity
from benchmarks.parity.cells import OURS, Cell, Plan
from benchmarks.parity.steps import Measured, resident_bytes, whole_bytes
from mitrain.compare.resident import optimizer_bytes
from mitrain.training import schema


class Hoarder(nn.Module):
    """A frozen weight whose payload the module's state keeps a second time, as bitsandbytes' Linear8bitLt does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
        self.state = type("State", (), {})()
        self.state.CB = torch.zeros(4, 8, dtype=torch.int8)


def test_hidden_copies_and_shards_are_counted_once_each():
    module = Hoarder()
    assert whole_bytes({"m": module}) == 32 and resident_bytes({"m": module}) == 64
    module.weight.ds_tensor = torch.zeros(16, dtype=torch.int8)
    module.weight.data = torch.empty(0, dtype=torch.int8)
    assert resident_bytes({"m": module}) == 16 + 32
    module.again = module.state.CB[:2]
    assert resident_bytes({"m": module}) == 16 + 32, "a view is no copy"


def test_trained_weights_are_not_frozen_bytes_and_tied_ones_count_once():
    trained, frozen = nn.Linear(3, 5), nn.Linear(3, 5, bias=False).requires_grad_(False)
    tied = nn.Linear(3, 5, bias=False)
    tied.weight = frozen.weight
    frozen.register_buffer("table", torch.zeros(2))
    part = nn.ModuleList([trained, frozen, tied])
    assert whole_bytes({"m": part}) == resident_bytes({"m": part}) == 4 * (15 + 2)


def test_optimizer_bytes_are_states_and_their_own_copies_of_weights():
    weight = nn.Parameter(torch.ones(10))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(10)
    optimizer.step()
    states = 2 * 40 + 4  # two moments, and the count of steps
    assert optimizer_bytes(optimizer, [weight]) == states
    assert optimizer_bytes(optimizer, []) == states + 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = make_world(tmp_path_factory.mktemp("world"))
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "bench.yaml").write_text(yaml.safe_dump(config | {"features": {"views": 2}}))
    return path


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))


def test_the_trunk_runs_in_every_step_and_images_stay_cached(world, cache):
    plan = Plan(str(world / "bench.yaml"), steps=2)
    trainer = Measured(schema.load(plan.config, plan.overrides(Cell(OURS, "fp32", 0, 1))), plan.samples)
    assert trainer.features.parts[0].encoding.store.folder and not trainer.model.states.cached
    assert len(trainer.train) == plan.samples
    runs = []
    trainer.model.text.model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    trainer.step()
    assert runs == [1]


def test_two_ranks_at_stage_3_agree_with_one_process(world, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("MITRAIN_CACHE", str(world / "cache"))
    plan = Plan(str(world / "bench.yaml"), steps=2)
    wanted = [Cell(OURS, "fp32", 0, 1), Cell(OURS, "fp32", 3, 2)]
    found = parity.parity(plan, wanted, tmp_path, "mitrain bench parity", lambda _: None, 300)
    alone, sharded = found["rows"]
    assert "error" not in sharded, sharded["error"]
    assert alone["ok"] and sharded["relative_difference"] <= cells.EXACT
    assert alone["losses"][0] != alone["losses"][-1] and alone["gathered_bytes_per_step"] == 0
    assert sharded["gathered_bytes_per_step"] > 0
    assert alone["resident_frozen_bytes_per_rank"] == alone["whole_frozen_bytes"] == sharded["whole_frozen_bytes"]
    assert sharded["optimizer_bytes"] < alone["optimizer_bytes"]
