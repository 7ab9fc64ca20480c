"""Frozen weights that a cache stands for: let go of, and read again from the checkpoint when something runs them.

What is let go of keeps its shape, type and device, and holds NaN in the memory of one element. Each module that owns such
tensors reads them again, bit for bit, when it is called, and then keeps them.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.core.errors import ModelError
from mitrain.models import loading
from mitrain.models.quant.linear import FrozenLinear
from mitrain.models.stream import Weights, fill_low_bit

log = logging.getLogger(__name__)
START = 16
"""Elements by which a tensor is looked for among those of its shape, before all of them are compared."""


class Released:
    """One module's own parameters, gone until it is called. ``sources``: what each is called in ``weights``."""

    def __init__(self, name: str, module: nn.Module, weights: Weights, sources: Mapping[str, str]):
        self.name, self.module, self.weights, self.sources = name, module, weights, sources
        self.stamps = weights.stamps()
        self.held = {own: p for own, p in module._parameters.items() if p is not None}
        self.device = next(iter(self.held.values())).device
        for parameter in self.held.values():
            parameter.data = placeholder(parameter)
        self.hook = module.register_forward_pre_hook(self.take_back)

    @torch.no_grad()
    def take_back(self, *_: Any) -> None:
        if self.weights.stamps() != self.stamps:
            folder = next(iter(self.weights.files.values())).parent
            raise ModelError(f"the weights in {str(folder)!r} were replaced while they were being used: start again")
        self.hook.remove()
        if isinstance(self.module, FrozenLinear):
            fill_low_bit(self.name, self.module, self.weights, self.device)
        for own, parameter in self.held.items():
            # A tied parameter may have been taken back by the other module that has it, low-bit ones are filled anew.
            if self.module._parameters[own] is parameter and is_released(parameter):
                stored = self.weights.checked(self.sources[own], parameter.shape)
                parameter.data = stored.to(self.device, parameter.dtype, copy=True)


def release(model: nn.Module, source: str | Path | None, parts: Iterable[nn.Module], keep: Collection[Tensor] = ()) -> int:
    """Let go of the weights of ``parts`` of a ``model`` that was loaded from ``source``; returns how many bytes those were.

    What could not be read again alike stays: a module whose tensors the checkpoint does not hold as the model does (an
    adapter may have changed them), or of which one is in ``keep``, trained or sharded.
    """
    weights = None if source is None else Weights.of(source)
    if weights is None or loading.holds_shards(model):
        return 0
    stored, kept, size = Stored(weights, model), set(map(id, keep)), 0
    wanted = {module for part in parts for module in part.modules()}
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and not is_released(p)]
        if module not in wanted or not own or any(id(p) in kept or p.requires_grad for p in own):
            continue
        if (sources := stored.sources(name, module)) is not None:
            size += sum(p.nbytes for p in own)
            Released(name, module, weights, sources)
    weights.close()  # or the pages that were compared would stay in the process's memory
    log.info("%d MB of frozen weights were let go of: the cache holds what they make of the samples", size // 10**6)
    return size


class Stored:
    """Finds a model's tensors in its checkpoint: by name, or where transformers renamed them by their content."""

    def __init__(self, weights: Weights, model: nn.Module):
        self.weights = weights
        self.found: dict[int, str] = {}  # of parameters that stand under several names
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.shapes: dict[torch.Size, list[str]] = {}  # of what has another name in the model
        for name in sorted(weights.names - own):
            self.shapes.setdefault(weights.read(name).shape, []).append(name)

    def sources(self, name: str, module: nn.Module) -> dict[str, str] | None:
        """What each of a module's own parameters is called in the checkpoint; None where one is not in it as it is.

        Of low-bit weights only the name is looked at.
        """
        found: dict[str, str] = {}
        for own, parameter in module._parameters.items():
            if parameter is not None and not (isinstance(module, FrozenLinear) and own != "bias"):
                if (place := self.place(f"{name}.{own}", parameter)) is None:
                    return None
                found[own] = place
        low_bit = isinstance(module, FrozenLinear)
        return None if low_bit and f"{name}.weight" not in self.weights.names else found

    def place(self, name: str, parameter: Tensor) -> str | None:
        if id(parameter) not in self.found:
            names = [name] if name in self.weights.names else self.shapes.get(parameter.shape, ())
            same = (other for other in names if equal(self.weights.read(other), parameter))
            if (place := next(same, None)) is None:
                return None
            self.found[id(parameter)] = place
        return self.found[id(parameter)]


def equal(stored: Tensor, held: Tensor) -> bool:
    """Whether ``held`` is what is ``stored``, rounded to its type."""
    if stored.shape != held.shape:
        return False
    parts = ([t.detach().flatten()[:START], t.detach()] for t in (stored, held))
    return all(torch.equal(there.to(here.dtype), here.cpu()) for there, here in zip(*parts, strict=True))


def placeholder(parameter: Tensor) -> Tensor:
    """NaN (of integers 0) in the shape, type and device of ``parameter``, in the memory of one element."""
    fill = torch.nan if parameter.is_floating_point() else 0
    return torch.full((1,), fill, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def is_released(parameter: Tensor) -> bool:
    return parameter.numel() > 1 and parameter.untyped_storage().nbytes() == parameter.element_size()
