"""LoRA beside the infusion, in the same layers, so that the trunk below stays frozen (arXiv 2106.09685, section 4.1).

By hooks and not PEFT's modules: of several adapters on one model only the one that acts in a context may change it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

COUNTS = 2.0
"""alpha / rank."""


class LowRank(nn.Module):
    """h = W x + 2 B A x for each of some frozen projections; B = 0 at the start.

    ``down.<i>``: Aᵀ (into, r); ``up.<i>``: B (out, r).
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], rank: int, **factory: object):
        super().__init__()
        normal = (torch.randn(into, rank, **factory) * into**-0.5 for into, _ in sizes)
        self.down = nn.ParameterList(nn.Parameter(values) for values in normal)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(out, rank, **factory)) for _, out in sizes)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(len(down), len(up)) for down, up in zip(self.down, self.up, strict=True)]

    def place(self, modules: Sequence[nn.Module], acts: Callable[[], bool], undo: Callable[..., None]) -> None:
        """Put hooks on the projections, which do nothing where it does not act."""
        for place, module in enumerate(modules):
            undo(module.register_forward_hook(self._hook(place, acts)).remove)

    def _hook(self, place: int, acts: Callable[[], bool]) -> Callable[..., Tensor | None]:
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if not acts():
                return None
            x = args[0].to(self.down[place].dtype)
            return output + (COUNTS * (x @ self.down[place] @ self.up[place].T)).to(output.dtype)

        return add


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(into, out) of a projection."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
