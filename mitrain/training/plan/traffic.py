"""What the ranks send one another in a step: reductions of gradients and, with ZeRO, gathers of weights.

Bytes are those of the whole tensors. Over a ring of N ranks each one sends (N − 1)/N of a gathered or scattered tensor,
and twice that of one that is reduced on all ranks.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mitrain.training.engine import ZeroConfig
from mitrain.training.engine.deepspeed_config import PERSIST, gather_limits, own_sizes


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step: of ``gathers`` (all-gather), ``scatters`` (reduce-scatter) and ``reductions`` (all-reduce).

    ``held``: the most bytes of gathered frozen weights that a rank holds at once.
    """

    gathers: int = 0
    scatters: int = 0
    reductions: int = 0
    held: int = 0

    @property
    def total(self) -> int:
        return self.gathers + self.scatters + self.reductions

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends over the slowest link of a ring."""
        return (ranks - 1) / ranks * (self.gathers + self.scatters + 2 * self.reductions)


def traffic(
    zero: ZeroConfig,
    ranks: int,
    trained: int,
    frozen: int,
    order: Sequence[tuple[nn.Module, bool]],
    accumulate: int = 1,
) -> Traffic:
    """``trained``: bytes of the trained weights, and of their gradients; ``frozen``: elements of all that are frozen.
    ``order``: `Traced.order` of one micro-batch."""
    if ranks == 1:
        return Traffic()
    if zero.stage == 0:
        return Traffic(reductions=trained)
    if zero.stage < 3:
        return Traffic(gathers=trained, reductions=trained)
    limits = gather_limits(frozen, own_sizes(zero))
    live, reuse, ahead = (
        int(limits[f"stage3_{name}"]) for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    )
    gathers, held = gathered(order, reuse, min(live, ahead))
    return Traffic(trained + accumulate * gathers, trained, 0, held)


def gathered(order: Sequence[tuple[nn.Module, bool]], reuse: int, ahead: int = 0) -> tuple[int, int]:
    """(bytes of frozen weights that are gathered in a forward and backward pass, the most that are held at once).

    Weights are let go behind a module unless they are used again within ``reuse`` elements, and ``ahead`` elements are
    fetched early; small ones are never sharded. Those of several modules stay from the first one's call to the last one's
    (`mitrain.training.engine.zero.hold_tied`).
    """
    forward = [own(module) for module, _ in order]
    backward = [own(module) for module, differentiated in reversed(order) if differentiated]
    uses = forward + backward
    owners = Counter(id(p) for module in {module for module, _ in order} for p in own(module))
    last = {id(p): i for i, weights in enumerate(forward) for p in weights if owners[id(p)] > 1}
    there: dict[int, Tensor] = {}
    total = held = 0
    for i, weights in enumerate(uses):
        missing = {id(p): p for p in weights if id(p) not in there}
        total += sum(p.numel() * p.element_size() for p in missing.values())
        there |= missing
        held = max(held, sum(p.numel() * p.element_size() for p in there.values()))
        again = soon(uses[i + 1 :], reuse)
        for weight in weights:
            if id(weight) not in again and i >= last.get(id(weight), 0):
                there.pop(id(weight), None)
    size = max((p.element_size() for weights in uses for p in weights), default=0)
    return total, min(held + ahead * size, total)


def own(module: nn.Module) -> list[Tensor]:
    return [p for p in module._parameters.values() if p is not None and not p.requires_grad and p.numel() > PERSIST]


def soon(uses: Iterable[Sequence[Tensor]], reuse: int) -> set[int]:
    found: set[int] = set()
    passed = 0
    for weights in uses:
        if passed >= reuse:
            break
        found.update(map(id, weights))
        passed += sum(p.numel() for p in weights)
    return found
