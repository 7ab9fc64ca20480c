"""Frozen weights that a cache stands for: not read, or let go of, until something runs them.

What is not there keeps its shape, type and device, and holds NaN in the memory of one element. Each module that owns such
tensors reads them from the checkpoint, bit for bit, when it is called, and then keeps them.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.core.errors import ModelError
from mitrain.models import layouts, loading
from mitrain.models.quant.linear import FrozenLinear
from mitrain.models.stream import Weights, fill_low_bit, placeholder

log = logging.getLogger(__name__)
START = 16
"""Elements by which a tensor is looked for among those of its shape, before all of them are compared."""


class Released:
    """One module's own parameters, gone until it is called. ``sources``: what each is called in ``weights``."""

    def __init__(self, name: str, module: nn.Module, weights: Weights, sources: Mapping[str, str]):
        self.name, self.module, self.weights, self.sources = name, module, weights, sources
        self.stamps = weights.stamps()
        self.let_go()

    def let_go(self, *_: Any) -> None:
        self.held = {own: p for own, p in self.module._parameters.items() if p is not None}
        self.device = next(iter(self.held.values())).device
        for parameter in self.held.values():
            parameter.data = placeholder(parameter, self.device)
        self.hook = self.module.register_forward_pre_hook(self.take_back)

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


def released_in(module: nn.Module) -> list[Released]:
    """What is gone of a module and those in it."""
    hooks = [hook for each in module.modules() for hook in each._forward_pre_hooks.values()]
    return [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Released)]


@contextmanager
def passing(module: nn.Module) -> Iterator[None]:
    """Inside, what is gone of ``module`` is there while its owner runs, and gone again behind it."""
    undo = [gone.module.register_forward_hook(gone.let_go) for gone in released_in(module)]
    try:
        yield
    finally:
        for hook in undo:
            hook.remove()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, everything of ``module`` is there, to be looked at."""
    there = released_in(module)
    for gone in there:
        gone.take_back()
    try:
        yield
    finally:
        for gone in there:
            gone.let_go()


def below(model: nn.Module, depth: int, speaks: bool) -> list[nn.Module]:
    """The modules of a language model whose own weights nothing reads that goes on from the states of its ``depth`` bottom
    layers: those layers, the embedding, and the head unless it ``speaks``."""
    head = model.get_output_embeddings()
    parts = [*layouts.layers_of(model)[:depth], model.get_input_embeddings()] if depth else []
    parts += [head] if depth and head is not None and not speaks else []
    kept = {id(p) for p in head.parameters()} if head is not None and speaks else set()
    modules = [module for part in parts for module in part.modules()]
    return [module for module in modules if not any(id(p) in kept for p in module.parameters(recurse=False))]


def watch(model: nn.Module, source: str | Path) -> nn.Module:
    """A ``model`` that was loaded from ``source`` with some weights left out: they are read when they are needed."""
    weights = Weights.of(source)
    places = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if weights and n in weights.names}
    for name, module in model.named_modules():
        own = {own: p for own, p in module._parameters.items() if p is not None and is_released(p)}
        if own and weights is not None:
            Released(name, module, weights, {key: places[id(p)] for key, p in own.items() if id(p) in places})
    return model


def releasable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that own parameters and train none. One of a single element would not be told from one that is gone."""
    own = {module: [*module.parameters(recurse=False)] for module in modules}
    return [m for m, held in own.items() if held and not any(p.requires_grad or p.numel() == 1 for p in held)]


def release(model: nn.Module, source: str | Path | None, modules: Iterable[nn.Module]) -> int:
    """Let go of the own weights of ``modules`` of a ``model`` that was loaded from ``source``; returns how many bytes those
    were.

    What could not be read again alike stays: what is not `releasable`, or sharded, or what the checkpoint does not hold as
    the model does (an adapter may have changed it).
    """
    weights = None if source is None else Weights.of(source)
    if weights is None or loading.holds_shards(model):
        return 0
    stored, size, wanted = Stored(weights, model), 0, set(releasable(modules))
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if not is_released(p)] if module in wanted else []
        if own and (sources := stored.sources(name, module)) is not None:
            size += sum(p.nbytes for p in own)
            Released(name, module, weights, sources)
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


def is_released(parameter: Tensor) -> bool:
    return parameter.numel() > 1 and parameter.untyped_storage().nbytes() == parameter.element_size()
