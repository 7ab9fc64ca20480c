"""``mitrain doctor`` on a rank, on machines that are in order or where rank 1 has a fault of every kind."""

import torch

from mitrain.cli import checks, main, rank_checks
from mitrain.cli.checks import Check
from mitrain.core import dist
from mitrain.training.engine import LocalEngine


def run(kind: str) -> int:
    torch.set_num_threads(1)
    odd = kind == "odd" and dist.rank_info().rank == 1
    checks.CHECKS = (lambda: Check("disk", not odd, "full" if odd else "empty", "make room" if odd else ""),)
    if kind == "odd":
        rank_checks.bandwidth.__defaults__ = (1e9,)
    if odd:
        LocalEngine.step = perturbed(LocalEngine.step)
    return main(["doctor", "--json"])


def perturbed(step):
    """One that leaves this rank's weights a little off."""

    def off(self):
        result = step(self)
        next(iter(self.params.values())).data.add_(1e-3)
        return result

    return off
