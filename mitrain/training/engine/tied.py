"""Weights that an embedding and a language head share, under ZeRO-3: gathered once for both.

DeepSpeed lets go of an embedding's weights when the embedding has run, unless it runs again within
``stage3_max_reuse_distance`` parameters, and the head, which lies behind all layers of a large model, does not.
"""

from typing import Any

from torch import nn


def hold_tied(root: nn.Module) -> None:
    """Let modules under ``root`` that share sharded parameters keep them from the first one's call to the last one's.

    Where the last one was not called since (a model without its head, states from a cache) nothing is kept the next time.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    pairs = {(shared[0], shared[-1]) for shared in owners.values() if len(shared) > 1}
    for first, last in pairs:
        Held(first, last)


class Held:
    """Two modules' common parameters; ``last`` counts as using them from the moment that ``first`` is called."""

    def __init__(self, first: nn.Module, last: nn.Module):
        own = {id(parameter) for parameter in last.parameters(recurse=False)}
        self.parameters = [parameter for parameter in first.parameters(recurse=False) if id(parameter) in own]
        self.user: int = last.ds_id
        self.awaited = False
        first.register_forward_pre_hook(self._begin)
        last.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        if self.awaited:
            for parameter in self.parameters:
                parameter.ds_active_sub_modules.add(self.user)
        self.awaited = False

    def _end(self, *_: Any) -> None:
        self.awaited = True
