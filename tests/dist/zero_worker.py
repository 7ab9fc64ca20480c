"""What the ranks of test_zero.py do; see worker.py."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from mitrain.core import dist
from mitrain.cli import main
from mitrain.training.engine import Engine, Group, LocalEngine, OptimizerConfig, ZeroConfig
from benchmarks.parity.gathers import counted_gathers
from mitrain.training.engine.zero import ZeroEngine, checked_json, gather_in_place, join, sharding
from mitrain.core.errors import ConfigError
from mitrain.models import loading
from mitrain.models.digests import tensor_digest
from mitrain.models.release import is_released
from mitrain.tasks.answer import AnswerTask
from mitrain.training.build import Model
from mitrain.training.evaluate import evaluate
from mitrain.training.trainer import Trainer

CLIP = OptimizerConfig(clip=0.5)
SPREADS = (
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 1, "offload_optimizer": True},
    {"stage": 3, "offload_optimizer": True, "offload_params": True},
)
POISONED, NARROW = 3, 4


def net() -> nn.Module:
    """A trained layer, a frozen one, a trained one of a width that two ranks cannot halve, and a parameter unused."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1))
    module[1].requires_grad_(False)
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return module


def engine_for(module: nn.Module, spread: dict | None) -> Engine:
    """With two groups of parameters, as an adapter and a head are: DeepSpeed partitions each by itself."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    head = {name: named.pop(name) for name in ("3.weight", "3.bias")}
    groups, schedule = [Group("net", named, 0.1), Group("head", head, 0.05)], lambda step: 0.9**step
    if spread is None:
        return LocalEngine(groups, schedule, CLIP)
    return ZeroEngine({"net": module}, groups, schedule, CLIP, ZeroConfig(**spread))


def step(engine: Engine, module: nn.Module, seed: int) -> list:
    """A step of 13 samples in micro-batches of 9, 1 and 3; in step `POISONED` rank 1's loss is not finite.

    In step `NARROW` there is one sample: rank 0 has none.
    """
    x = torch.randn(1 if seed == NARROW else 13, 5, generator=torch.Generator().manual_seed(seed))
    for micro in x.split([1] if seed == NARROW else [9, 1, 3]):
        mine = micro[dist.shard_of(len(micro))]
        count = len(mine)
        if count or engine.lockstep:
            mine = mine if count else micro[:1]
            loss = engine.forward(lambda part=mine: ((module(part) - part.sum(1, keepdim=True)) ** 2).sum())
            engine.backward(loss * (math.inf if seed == POISONED and dist.rank() else 1), count)
    result = engine.step()
    return [result.applied, result.reason, result.loss, result.grad_norm, result.lr, result.count]


def run(spread: dict | None, first: int = 0, last: int = 6, saved: Any = None, tried: int = 0) -> tuple[list, Any]:
    """Results of the steps first…last, and what a checkpoint would hold; from ``saved`` of an engine before.

    ``tried``: so many samples go through the engine before the first step, and are discarded.
    """
    module = net()
    engine = engine_for(module, spread)
    if saved is not None:
        with engine.gathered(write=True), torch.no_grad():
            for name, parameter in engine.params.items():
                parameter.copy_(saved[0][name])
        engine.load_state_dict(*saved[1])
    if tried:
        mine = torch.ones(tried, 5)
        engine.backward(engine.forward(lambda: module(mine).sum()), tried)
        engine.discard()
    results = [step(engine, module, seed) for seed in range(first, last)]
    with engine.gathered():
        return results, ({n: p.detach().clone() for n, p in engine.params.items()}, engine.state_dict())


def bucket(spread: dict) -> list[int]:
    """Elements of the bucket for gradients that DeepSpeed is asked for, of those that are trained, of one of the user's."""
    own = ZeroConfig(**spread, config={"zero_optimization": {"reduce_bucket_size": 77}})
    module = net()
    groups = [Group("net", {name: p for name, p in module.named_parameters() if p.requires_grad}, 0.1)]
    theirs = ZeroEngine({"net": module}, groups, lambda step: 1.0, CLIP, own)
    engine = engine_for(net(), spread)
    asked = [e.json["zero_optimization"]["reduce_bucket_size"] for e in (engine, theirs)]
    return [asked[0], sum(loading.elements(p) for p in engine.params.values()), asked[1]]


def listed(saved: Any) -> dict:
    weights, (slots, _) = saved
    return {name: tensor.tolist() for name, tensor in {**weights, **slots}.items()}


def engines() -> dict:
    """Every spread beside the plain engine: whole, and from a state saved after two steps by itself and by the other."""
    plain, after = run(None)
    tried, end = run(None, tried=40)
    found: dict[str, Any] = {"plain": [plain, listed(after)], "plain tried": [tried, listed(end)]}
    _, plain_half = run(None, last=2)
    for spread in SPREADS:
        results, whole = run(spread)
        _, half = run(spread, last=2)
        tried, tried_end = run(spread, tried=40)
        resumed, end = run(spread, 2, 6, half)
        crossed, crossed_end = run(spread, 2, 6, plain_half)
        back, back_end = run(None, 2, 6, half)
        found[json.dumps(spread)] = {
            "whole": [results, listed(whole)],
            "bucket": bucket(spread),
            "tried": [tried, listed(tried_end)],
            "resumed": [resumed, listed(end)],
            "from plain": [crossed, listed(crossed_end)],
            "to plain": [back, listed(back_end)],
        }
    return found


def held(module: nn.Module) -> dict[str, int]:
    """Bytes of the frozen weights: on all ranks together, in this rank's shards, gathered on it beside them; and of an
    element of every parameter."""
    found = dict.fromkeys(("whole", "shards", "gathered", "slack"), 0)
    for parameter in {id(p): p for p in module.parameters() if not p.requires_grad}.values():
        found["whole"] += parameter.ds_numel * parameter.element_size()
        found["shards"] += parameter.ds_tensor.untyped_storage().nbytes()
        found["gathered"] += parameter.numel() * parameter.element_size()
        found["slack"] += parameter.element_size()
    return found


class Tied(nn.Module):
    """An embedding whose weights are the head's, with a frozen and a trained layer between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(100, 8), nn.Linear(8, 100, bias=False)
        self.frozen, self.own = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.requires_grad_(False)
        self.own.requires_grad_(True)

    def forward(self, ids: torch.Tensor, headless: bool) -> torch.Tensor:
        states = self.own(self.frozen(self.embedding(ids)))
        return states if headless else self.head(states)


def tied(headless: bool) -> list[list[int]]:
    """Of each step: bytes gathered by its forward pass, and elements of the shared weights that are whole after it."""
    sizes = {"max_reuse_distance": 0, "param_persistence_threshold": 0, "prefetch_bucket_size": 0}
    zero = ZeroConfig(stage=3, config={"zero_optimization": {f"stage3_{k}": value for k, value in sizes.items()}})
    module, found = Tied(), []
    sharding(zero, CLIP)(module)
    engine = ZeroEngine({"net": module}, [Group("net", {"own": module.own.weight}, 0.1)], lambda _: 1.0, CLIP, zero)
    for number in range(3):
        with counted_gathers() as gathered:
            loss = engine.forward(lambda ids=torch.arange(4) + number: module(ids, headless).square().sum())
            forward = gathered.bytes
            engine.backward(loss, 4)
            engine.step()
        found.append([forward, module.embedding.weight.numel()])
    return found


def layers(settings: dict[str, int]) -> list[int]:
    """Of sixteen frozen layers above a trained one: how many are whole on this rank at once, the most of each step."""
    zero = ZeroConfig(stage=3, config={"zero_optimization": settings})
    module, found = nn.Sequential(*(nn.Linear(120, 120, bias=False) for _ in range(17))), []
    module[1:].requires_grad_(False)
    sharding(zero, CLIP)(module)
    engine = ZeroEngine({"net": module}, [Group("net", {"own": module[0].weight}, 0.1)], lambda _: 1.0, CLIP, zero)

    weights = [layer.weight for layer in module[1:]]  # to ask a module for its own would gather it

    def count(*_: Any) -> None:
        found[-1] = max(found[-1], sum(weight.numel() > 0 for weight in weights))

    for layer in module[1:]:
        layer.register_forward_hook(count)
        layer.register_full_backward_hook(count)
    for _ in range(4):
        found.append(0)
        engine.backward(engine.forward(lambda: module(torch.ones(2, 120)).square().sum()), 2)
        engine.step()
    return found


def gathers() -> list[bool]:
    """Whether what we gather in place, at once and waited for, of a part of its own and of one that lies in the output, is
    what torch gathers."""
    found, here = [], dist.rank_info()
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        part = (torch.arange(5) - 11 * here.rank).to(dtype)
        expected = torch.empty(5 * here.world, dtype=dtype)
        distributed.all_gather_into_tensor(expected, part)
        for later in (False, True):
            for inside in (False, True):
                whole = torch.full_like(expected, 77)
                own = whole[5 * here.rank :][:5].copy_(part) if inside else part
                work = gather_in_place(whole, own, async_op=later)
                if work:
                    work.wait()
                found.append(bool(work) is later and torch.equal(whole, expected))
    join()
    return [*found, sys.modules["deepspeed.comm.comm"].cdb.all_gather_function is gather_in_place]


def refusal() -> str:
    """What a setting is answered with that DeepSpeed does not know."""
    try:
        checked_json(ZeroConfig(stage=3, config={"zero_optimization": {"reduce_bucket_sise": 5}}), CLIP)
    except ConfigError as error:
        return str(error)
    return ""


def compare(out: str) -> int:
    torch.set_num_threads(1)
    with dist.process_group() as here:
        found = {**engines(), "refusal": refusal(), "tied": tied(False), "headless": tied(True)}
        defaults = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        found |= {
            "gathers": gathers(),
            "layers": layers({}),
            "all layers": layers({f"stage3_{name}": 10**9 for name in defaults}),
        }
    (Path(out) / f"{here.rank}.json").write_text(json.dumps(found))
    return 0


def train(world: str, out: str, *arguments: str) -> int:
    """``mitrain train ARGUMENTS``; OUT/RANK.json has what the frozen weights took when they were loaded, before the first
    step and at the end, and digests of the language model's shards as they were loaded and after all layers have run."""
    torch.set_num_threads(1)
    finished, release, found = Trainer.fit, Model.release, {}

    def shards(model: Model) -> list[str]:
        parameters = [p for p in model.text.model.parameters() if not p.requires_grad]
        ends = [min(p.ds_tensor.numel(), p.ds_numel - dist.rank() * p.ds_tensor.numel()) for p in parameters]
        return [tensor_digest("", p.ds_tensor[:end]).hex() for p, end in zip(parameters, ends, strict=True)]

    def count(model: Model) -> dict[str, dict[str, int]]:
        return {name: held(module) for name, module in model.frozen.items()}

    def noted(model: Model) -> None:
        if loading.holds_shards(model.text.model):
            found.update(held=count(model), loaded=shards(model))
        release(model)

    def counted(trainer: Trainer) -> Any:
        if trainer.config.zero.stage != 3:
            return finished(trainer)
        found["first"], outcome, found["last"] = count(trainer.model), finished(trainer), count(trainer.model)
        evaluate(trainer.model, trainer.features, trainer.val, generate=True)
        found["run"] = shards(trainer.model)
        return outcome

    Trainer.fit, Model.release = counted, noted
    code = main(["train", *arguments])
    rank = os.environ["RANK"]
    (Path(out) / f"{rank}.json").write_text(json.dumps({"held": {}, **found, "extensions": extensions()}))
    return code


def speaking(world: str, out: str, *arguments: str) -> int:
    """`train` whose evaluations also let the model speak; OUT/RANK.ahead has, of each order of modules that DeepSpeed learnt,
    how many of them have no weights between the evaluations."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    learn, place = Coordinator.construct_parameter_trace_from_module_trace, Path(out) / f"{os.environ['RANK']}.ahead"

    def learnt(self: Any) -> None:
        order = self._PartitionedParameterCoordinator__submodule_order
        gone = sum(any(map(is_released, module.parameters(recurse=False))) for module in order)
        place.write_text(f"{place.read_text()} {gone}/{len(order)}")
        learn(self)

    Coordinator.construct_parameter_trace_from_module_trace = learnt
    place.write_text("learnt:")
    AnswerTask.must_generate = lambda self, samples: True
    return train(world, out, *arguments)


def extensions() -> list[str]:
    """What was compiled on the spot."""
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    return sorted(str(path) for path in folder.rglob("*"))


def score(folder: str, *arguments: str) -> int:
    torch.set_num_threads(1)
    return main(["eval", folder, *arguments])
