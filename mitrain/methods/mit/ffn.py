"""Feed-forward infusion (MiT, arXiv 2403.05060, Eq. 6-7): the activation before the last projection times f(I).

A SiLU-gated block, down(SiLU(gate x) ⊙ up x), is replaced by one that hands its three frozen projections to the
fused operator; every other block keeps its own code and gets a hook on the last projection.

Shapes: B samples, T tokens, d_ff feed-forward width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mitrain_kernels.infused_swiglu import infused_swiglu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mitrain.methods.kernels import feed_forward_backend
from mitrain.models import layouts, loading

Factor = Callable[[], Tensor | None]
"""f of the running forward pass, (B, d_ff); None where nothing is bound."""
Read = Callable[[], Tensor | None]
"""Whose outputs are read, (B, T) bool; None where all may be."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class InfusedFeedForward(nn.Module):
    """Stands in a layer for its SiLU-gated ``block``, whose projections, hooks and attributes it shares by name.

    What is not ``read`` is zero.
    """

    def __init__(self, block: nn.Module, factor: Factor, backend: str = "auto", read: Read = lambda: None):
        super().__init__()
        self.__dict__.update(block.__dict__)  # the block's own dictionaries of submodules and hooks, not copies
        self.__dict__.update(_block=block, _factor=factor, _backend=backend, _read=read)

    def forward(self, x: Tensor) -> Tensor:
        factor, read = self._factor(), self._read()
        if factor is None:
            return self._block.forward(x)
        if read is None or read.shape != x.shape[:-1]:
            return self._infused(x, factor)
        places = read.to(x.device).nonzero(as_tuple=True)  # each once, so that gradients count once
        found = self._infused(x[places], factor[places[0].to(factor.device)])
        return torch.zeros_like(x).index_put(places, found)

    def _infused(self, x: Tensor, factor: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        shape = (len(factor), -1, gate.shape[-1])
        hidden = infused_swiglu(gate.reshape(shape), up.reshape(shape), factor.to(gate.device), backend=self._backend)
        return self.down_proj(hidden.reshape(gate.shape))


def infuse(
    layer: nn.Module,
    projection: nn.Module,
    factor: Factor,
    dtype: torch.dtype,
    backend: str = "auto",
    read: Read = lambda: None,
) -> Callable[[], None]:
    """Multiply what enters ``projection``, the last of ``layer``'s feed-forward, by ``factor()``; returns the undoing.

    dtype: of the model's activations. backend: of infused attention; the feed-forward's follows. read: what a fused one
    may leave out.
    """
    for name, block in layouts.feed_forward_blocks(layer):
        if name and getattr(block, "down_proj", None) is projection and is_swiglu(block, dtype):
            setattr(layer, name, InfusedFeedForward(block, factor, feed_forward_backend(backend), read))
            return lambda: setattr(layer, name, block)

    def multiply(module: nn.Module, args: tuple) -> tuple | None:
        f = factor()
        return None if f is None else (times(args[0], f), *args[1:])

    return projection.register_forward_pre_hook(multiply).remove


def times(hidden: Tensor, factor: Tensor) -> Tensor:
    """hidden ⊙ f[sample] for hidden (B, T, d_ff) or (B · T, d_ff), in hidden's type."""
    factor = factor.to(hidden.device, hidden.dtype)
    return (hidden.reshape(len(factor), -1, hidden.shape[-1]) * factor[:, None]).reshape(hidden.shape)


@torch.no_grad()
def is_swiglu(block: nn.Module, dtype: torch.dtype) -> bool:
    """Whether ``block`` computes down(SiLU(gate x) ⊙ up x) to the last bit, found by trying; without weights, by the
    same operators.

    Names alone don't tell: some blocks of these three projections scale, clamp, normalise or sparsify in between. The
    second trial is large enough to meet a clamp.
    """
    if any(not hasattr(getattr(block, name, None), "in_features") for name in PROJECTIONS):
        return False
    if "forward" in block.__dict__:  # patched by others
        return False
    weights = list(block.parameters())
    x = torch.linspace(-1, 1, block.gate_proj.in_features, dtype=dtype, device=weights[0].device)
    x = torch.stack([x, 30 * x])[None]
    plain = lambda x: block.down_proj(F.silu(block.gate_proj(x)) * block.up_proj(x))  # noqa: E731
    if any(weight.is_meta for weight in weights):
        return operators(block.forward, x) == operators(plain, x)
    with loading.gathered(weights):
        return torch.equal(block.forward(x), plain(x))


def operators(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Any]:
    """The torch operators that ``function`` calls: all that tells it from another where there are no numbers."""
    function(x)  # what is made at the first call alone is no part of it
    with Recorder() as recorder:
        function(x)
    return recorder.called


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))
