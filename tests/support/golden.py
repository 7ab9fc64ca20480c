"""What the golden checkpoint in tests/golden holds, made anew from a formula; ``python golden.py`` writes the format.

A format's golden folder is written once, by the code that introduced the format, and never again.
"""

from pathlib import Path
from typing import Any

import torch
from source_tree import ROOT
from torch import Tensor

from mitrain.training import checkpoint

GOLDEN = ROOT / "tests" / "golden"
STEP, SEED, RANKS = 7, 11, 2


def ramp(*shape: int, start: float = -1.0) -> Tensor:
    """start, start + 1/8, … in float32: exact in bfloat16 too."""
    return (torch.arange(torch.Size(shape).numel()) / 8 + start).reshape(shape)


def tensors() -> dict[str, dict[str, Tensor]]:
    return {
        "adapter": {"infused.2.maps.image.ffn.weight": ramp(3, 4), "infused.2.head_logit": ramp(2).bfloat16()},
        "head": {},
        "features": {"mean": ramp(4), "scale": ramp(4, start=1.0)},
        "optimizer": {
            "exp_avg.adapter.infused.2.maps.image.ffn.weight": ramp(3, 4, start=0.0),
            "step.adapter.infused.2.maps.image.ffn.weight": torch.tensor(7.0),
        },
    }


def state() -> dict[str, Any]:
    """The JSON state of two ranks."""
    rng = []
    for rank in range(RANKS):
        checkpoint.seed_rank(SEED, STEP, rank)
        rng.append(checkpoint.rng_state())
    return {"loader": {"epoch": 1, "position": 24}, "best": 0.625, "best_step": STEP, "rng": rng, "note": "naïve"}


if __name__ == "__main__":
    run = GOLDEN / f"format-{checkpoint.FORMAT}"
    assert not Path(run).exists(), "a golden checkpoint is never written again"
    checkpoint.save(run, STEP, tensors(), state(), best=True)
