"""What the ranks of test_ranks.py do: ``run`` makes every check below and writes what each found to OUT/RANK.json.

A check is a function of the world's folder; all ranks call them in the same order, in one process group.
"""

import json
import math
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from mitrain.core import dist
from mitrain.cli import main
from mitrain.data.cache import FeatureCache
from mitrain.training.engine import Group, LocalEngine, OptimizerConfig
from mitrain.core.errors import UserError
from mitrain.training.guard import StopRequest
from mitrain.training.trainer import Trainer

CLIPPED = (OptimizerConfig(clip=0.05), OptimizerConfig(clip=0.01, clip_by="value"), OptimizerConfig(clip=None))


def net(dtype: torch.dtype) -> nn.Module:
    """Two layers, and a parameter that no loss reaches."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
    module.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=dtype)))
    return module


def trained(config: OptimizerConfig, dtype: torch.dtype, part) -> list:
    """Weights and results of 5 steps of 13 samples in micro-batches of 9, 1 and 3; ``part`` is what a rank sees."""
    module = net(dtype)
    engine = LocalEngine([Group("net", dict(module.named_parameters()), 0.1, 0.01)], lambda _: 1.0, config)
    found = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(13, 5, generator=generator, dtype=torch.float64).to(dtype)
        for micro in x.split([9, 1, 3]):
            mine = micro[part(len(micro))]
            if len(mine):
                engine.backward(((module(mine) - mine.sum(1, keepdim=True)) ** 2).sum(), len(mine))
        result = engine.step()
        found.append([result.loss, result.grad_norm, result.count])
    return [found, [p.tolist() for p in module.parameters()]]


def engine(_: Path) -> dict:
    """Steps of which every rank sees its share."""
    found = {}
    for i, config in enumerate(CLIPPED):
        for dtype in (torch.float64, torch.float32):
            found[f"{i} {dtype}"] = trained(config, dtype, dist.shard_of)
    return found


def skips(_: Path) -> list:
    """Whatever goes wrong on one rank alone, both skip, for the same reason, and keep equal weights."""
    module = net(torch.float64)
    engine = LocalEngine([Group("net", dict(module.named_parameters()), 0.1)], lambda _: 1.0)
    found = []
    for poison in ("nothing", "loss", "gradient", "no samples here", "no samples", "nothing"):
        x = torch.ones(2, 5, dtype=torch.float64)
        scale = math.nan if poison == "loss" and not dist.is_main() else 1.0
        if poison == "gradient" and not dist.is_main():
            engine.backward((module(x) * 0).abs().sqrt().sum(), 2)
        elif poison != "no samples" and (poison != "no samples here" or dist.is_main()):
            engine.backward(module(x).sum() * scale, 2)
        result = engine.step()
        found.append([poison, result.applied, result.reason, result.count])
    return [found, [p.tolist() for p in module.parameters()]]


def collectives(_: Path) -> dict:
    rank = dist.rank()
    weights = torch.full((3,), float(rank))
    dist.copy_from_main([weights])
    dist.barrier()
    return {
        "sum": dist.sum_across(torch.tensor([rank + 1.0, rank])).tolist(),
        "agree": [dist.any_rank(rank == 1), dist.any_rank(False), dist.any_rank(True)],
        "gather": dist.gather("x" * rank),
        "from main": dist.from_main(lambda: [rank, os.getpid()])[0],
        "refused": refused(rank),
        "copied": weights.tolist(),
    }


def refused(rank: int) -> list:
    def make() -> None:
        raise UserError(f"rank {rank} refuses")

    try:
        dist.from_main(make)
    except UserError as error:
        return [str(error), error.reported]


def cache(world: Path) -> list:
    """Each rank computes half, and all have everything."""
    store = FeatureCache(world / "shared-cache", {"of": "the test"}, {"a": "float32"})
    keys = [str(i) for i in range(11)]
    computed = store.fill(keys, lambda some: {key: {"a": torch.full((1, 2), float(key)).numpy()} for key in some})
    return [computed, [store.get(key)["a"].tolist() for key in keys], len(list(store.folder.glob("*/index.bin")))]


def stop(world: Path) -> list:
    """A signal that reaches one rank stops all at the same step, with its name."""
    with StopRequest() as request:
        before = dist.first_not_none(request.requested)
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return [before, dist.first_not_none(request.requested)]


def fresh(world: Path) -> int:
    return main(["train", str(world / "config.yaml"), "name=fresh", "--runs", str(world / "two")])


def resumed(world: Path) -> int:
    return main(["train", "--resume", str(world / "one-interrupted")])


def interrupted(world: Path) -> list:
    """Rank 1 is told to stop in the middle of step 4; then all go on."""
    step, calls = Trainer._step, []

    def counted(self):
        calls.append(1)
        if len(calls) == 4 and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    Trainer._step = counted
    try:
        first = main(["train", str(world / "config.yaml"), "name=stopped", "--runs", str(world / "two")])
    finally:
        Trainer._step = step
    (folder,) = (world / "two").glob("stopped-*")
    return [len(calls), first, main(["train", "--resume", str(folder)])]


def scored(world: Path) -> int:
    (folder,) = (world / "two").glob("fresh-*")
    return main(["eval", str(folder), "--split", "test", "--generate", "--samples", "13", "--json"])


CHECKS = (collectives, engine, skips, cache, stop, fresh, resumed, interrupted, scored)


def run(world: str, out: str) -> None:
    torch.set_num_threads(1)
    with dist.process_group() as here:
        found = {check.__name__: check(Path(world)) for check in CHECKS}
    (Path(out) / f"{here.rank}.json").write_text(json.dumps(found))


def meets(out: str) -> None:
    """Three groups one after the other, in each of which rank 0 comes late: rank 1 finds nothing of the group before."""
    found = []
    for step in range(3):
        time.sleep(0.0 if dist.rank_info().rank else 0.5)
        with dist.process_group() as here:
            found.append([dist.gather(here.rank + step), dist.absent(RuntimeError("timed out"))])
            if dist.is_main():
                dist.mark(9)
            dist.barrier()
    (Path(out) / f"{here.rank}.json").write_text(json.dumps(found))


def command(*arguments: str) -> int:
    torch.set_num_threads(1)
    return main(arguments)


def spoilt(rank: str, step: str, *arguments: str) -> int:
    """Train; one element of the adapter of ``rank`` alone becomes infinite after ``step``."""
    stepped = Trainer._step

    def spoiling(self):
        done = stepped(self)
        if [dist.rank(), self.engine.steps] == [int(rank), int(step)]:
            with torch.no_grad():
                next(self.model.adapter.parameters()).view(-1)[0] = torch.inf
        return done

    Trainer._step = spoiling
    return command("train", *arguments)


def train_until(out: str, stop: str, *arguments: str) -> int:
    """Train, rank 0 asking to stop in step ``stop``; OUT/until-STOP-RANK.json lists this rank's samples by micro-batch."""
    shares: list[list[str]] = []
    accumulate, step, last = Trainer._accumulate, Trainer._step, int(stop)

    def recorded(self, draws, share):
        shares.append([draw.sample.id for draw in draws[share]])
        return accumulate(self, draws, share)

    def stopped(self):
        if dist.is_main() and self.engine.steps == last - 1 and last < self.config.train.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    Trainer._accumulate, Trainer._step = recorded, stopped
    code = command("train", *arguments)
    rank = os.environ["RANK"]
    (Path(out) / f"until-{stop}-{rank}.json").write_text(json.dumps(shares))
    return code
