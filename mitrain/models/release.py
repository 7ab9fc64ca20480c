"""Frozen weights that a cache stands for: not read, or let go of, until something runs them.

What is not there keeps its shape, type and device, and holds NaN in the memory of one element. Each module that owns such
tensors reads them from the checkpoint, bit for bit, when it is called, and then keeps them.
"""

import ctypes
import itertools
import logging
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mitrain.core import allocator, dist
from mitrain.core.errors import ModelError
from mitrain.models import layouts, loading
from mitrain.models.quant.linear import FrozenLinear
from mitrain.models.stream import Weights, fill_low_bit, placeholder

log = logging.getLogger(__name__)
START, BLOCK = 16, 1 << 22
"""Elements by which a tensor is looked for among those of its shape, and so many of it that are compared at once."""


class Released:
    """Parameters of one module's own, gone until it is called. ``sources``: what each is called in ``weights``.

    ``lent``: they come back for a moment, as they lie in the checkpoint's file where they have its type, and whole where
    they lie in shards: ranks then send one another nothing.
    """

    def __init__(self, name: str, module: nn.Module, weights: Weights, sources: Mapping[str, str]):
        self.name, self.module, self.weights, self.sources = name, module, weights, sources
        self.stamps = weights.stamps()
        self.hook: RemovableHandle | None = None
        self.lent = False
        self.let_go()

    def let_go(self, *_: Any) -> None:
        if self.hook is None:
            self.held = {own: p for own, p in self.module._parameters.items() if p is not None and can_go(p)}
            self.device = next(held_in(p) for p in self.held.values()).device
            for parameter in self.held.values():
                leave(parameter)
            # First of all hooks: DeepSpeed's gather the shards.
            self.hook = self.module.register_forward_pre_hook(self.take_back, prepend=True)

    @torch.no_grad()
    def take_back(self, *_: Any) -> None:
        if self.hook is None:
            return
        if self.weights.stamps() != self.stamps:
            folder = next(iter(self.weights.files.values())).parent
            raise ModelError(f"the weights in {str(folder)!r} were replaced while they were being used: start again")
        self.hook.remove()
        self.hook = None
        if isinstance(self.module, FrozenLinear):
            fill_low_bit(self.name, self.module, self.weights, self.device)
        for own, parameter in self.held.items():
            # A tied parameter may have been taken back by the other module that has it, low-bit ones are filled anew.
            # By `get`: DeepSpeed's dictionary gathers what is asked for with brackets.
            if self.module._parameters.get(own) is parameter and is_released(parameter):
                self._read(own, parameter)

    def _read(self, own: str, parameter: Tensor) -> None:
        held = held_in(parameter)
        if self.lent:
            # A shard may be on another device than the whole.
            parameter.data = self.weights.read(self.sources[own]).to(parameter.device, held.dtype)
            mark(parameter, there=True)
            return
        share = share_of(self.weights.checked(self.sources[own], shape_of(parameter)), parameter)
        held.data = torch.empty(held.shape, dtype=held.dtype, device=self.device)
        held.flatten()[: share.numel()] = share.flatten()

    def check(self) -> None:
        """ModelError where what is stored is not finite."""
        for own, source in self.sources.items():
            self.weights.checked(source, shape_of(self.module._parameters.get(own)))


def released_in(module: nn.Module) -> list[Released]:
    """What is gone of a module and those in it."""
    return [gone for each in module.modules() for gone in watching(each)]


def watching(module: nn.Module) -> list[Released]:
    """What is gone of a module's own."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Released)]


@contextmanager
def passing(module: nn.Module) -> Iterator[None]:
    """Inside, what is gone of ``module`` is there while its owner runs, and gone again behind it; what is quantised as it is
    read, which takes longer than to run it, goes at the end."""
    there = released_in(module)
    floats = [gone for gone in there if not isinstance(gone.module, FrozenLinear)]
    # First of all hooks: DeepSpeed's would let go of what it takes for gathered shards.
    undo = [gone.module.register_forward_hook(gone.let_go, prepend=True) for gone in floats]
    with lending(there):
        try:
            yield
        finally:
            for hook in undo:
                hook.remove()
            for gone in there:
                gone.let_go()


@contextmanager
def borrowed(module: nn.Module) -> Iterator[None]:
    """Inside, what is gone of ``module`` comes back when it runs, and stays; it is gone again afterwards."""
    there = released_in(module)
    try:
        yield
    finally:
        for gone in there:
            gone.let_go()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, everything of ``module`` is there, to be looked at."""
    there = released_in(module)
    with lending(there):
        for gone in there:
            gone.check()
            gone.take_back()
        try:
            yield
        finally:
            for gone in there:
                gone.let_go()


@contextmanager
def lending(there: Iterable[Released]) -> Iterator[None]:
    for gone in there:
        gone.lent = True
    try:
        yield
    finally:
        for gone in there:
            gone.lent = False


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


def releasable(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that can be let go of; none where one is trained."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    low_bit_shards = isinstance(module, FrozenLinear) and any(map(loading.is_sharded, own.values()))
    stays = low_bit_shards or any(p.requires_grad for p in own.values())
    return [] if stays else [name for name, p in own.items() if can_go(p)]


def release(model: nn.Module, source: str | Path | None, modules: Iterable[nn.Module]) -> int:
    """Let go of the own weights of ``modules`` of a ``model`` that was loaded from ``source``; returns how many bytes those
    were on this rank.

    What could not be read again alike stays: what is not `releasable`, or what the checkpoint does not hold as the model
    does (an adapter may have changed it).
    """
    weights = None if source is None else Weights.of(source)
    if weights is None:
        return 0
    stored, wanted, going, held = Stored(weights, model), set(modules), [], {}
    for name, module in model.named_modules():
        names = releasable(module) if module in wanted and not watching(module) else []
        own = {key: module._parameters[key] for key in names}
        if own and (sources := stored.sources(name, module, own)) is not None:
            held |= {id(p): held_in(p) for p in own.values() if not is_released(p)}
            going.append((name, module, sources))
    size = sum(tensor.nbytes for tensor in held.values())
    leave_files(held.values())
    for name, module, sources in going:
        Released(name, module, weights, sources)
    allocator.give_back()
    log.info("%d MB of frozen weights were let go of: the cache holds what they make of the samples", size // 10**6)
    return size


def leave_files(tensors: Iterable[Tensor]) -> None:
    """Take the pages of a checkpoint's file that ``tensors``, unchanged since they were read, lie in out of this process.

    Tensors of a file may share one map of it, which stays as long as one of them is in use, with every page that was read. A
    page that is read again comes from the file. Elsewhere than on Linux nothing is done.
    """
    with suppress(OSError, AttributeError):
        maps, advise = private_maps(), ctypes.CDLL("libc.so.6").madvise
        for tensor in tensors:
            page, start = mmap.PAGESIZE, tensor.data_ptr()
            first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
            if first < last and tensor.is_contiguous() and any(low <= first and last <= high for low, high in maps):
                advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def private_maps() -> list[tuple[int, int]]:
    """First and last address of each private map of a safetensors file: what is written there stays in the process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights, *_, name = line.split(maxsplit=5)
        if name.endswith(".safetensors") and rights.endswith("p"):
            low, high = place.split("-")
            found.append((int(low, 16), int(high, 16)))
    return found


class Stored:
    """Finds a model's tensors in its checkpoint: by name, or where transformers renamed them by their content."""

    def __init__(self, weights: Weights, model: nn.Module):
        self.weights = weights
        self.found: dict[int, str] = {}  # of parameters that stand under several names
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.shapes: dict[torch.Size, list[str]] = {}  # of what has another name in the model
        for name in sorted(weights.names - own):
            self.shapes.setdefault(weights.read(name).shape, []).append(name)

    def sources(self, name: str, module: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str] | None:
        """What a module's parameters ``own`` are called in the checkpoint; None where one is not in it as it is.

        Of low-bit weights only the name is looked at.
        """
        low_bit, found = isinstance(module, FrozenLinear), {}
        for key, parameter in own.items():
            if not low_bit or key == "bias":
                if (place := self.place(f"{name}.{key}", parameter)) is None:
                    return None
                found[key] = place
        return None if low_bit and f"{name}.weight" not in self.weights.names else found

    def place(self, name: str, parameter: Tensor) -> str | None:
        if id(parameter) not in self.found:
            names = [name] if name in self.weights.names else self.shapes.get(shape_of(parameter), ())
            same = (other for other in names if equal(self.weights.read(other), parameter))
            if (place := next(same, None)) is None:
                return None
            self.found[id(parameter)] = place
        return self.found[id(parameter)]


def equal(stored: Tensor, parameter: Tensor) -> bool:
    """Whether ``parameter``, or this rank's shard of it, is what is ``stored``, rounded to its type."""
    if stored.shape != shape_of(parameter):
        return False
    there, here = share_of(stored, parameter).flatten(), held_in(parameter).detach().flatten()
    for first, end in itertools.pairwise([0, *range(START, there.numel(), BLOCK), there.numel()]):
        part, own = there[first:end], here[first:end]
        if not torch.equal(part.to(own.dtype), own.cpu()):
            return False
        if there.numel() > BLOCK:
            leave_files([part])  # a table of words would stand in this process twice
    return True


def can_go(parameter: Tensor) -> bool:
    """One of a single element would not be told from one that is gone; of shards, small ones stay whole on every rank, and
    there may be copies that are not ours."""
    if not loading.is_sharded(parameter):
        return parameter.numel() > 1
    own = parameter.ds_tensor
    alone = own.final_location is None and getattr(parameter, "ds_secondary_tensor", None) is None
    return alone and not parameter.ds_persist and own.numel() > 1


def leave(parameter: Tensor) -> None:
    """Let go of what holds it on this rank, and of what was gathered or lent of it."""
    if loading.is_sharded(parameter) and parameter.numel():
        parameter.data = parameter.new_empty(0)
        mark(parameter, there=False)
    held_in(parameter).data = placeholder(held_in(parameter), held_in(parameter).device)


def mark(parameter: Tensor, there: bool) -> None:
    """Of one in shards, let DeepSpeed know whether it is whole here."""
    if loading.is_sharded(parameter):
        known = type(parameter.ds_status)
        parameter.ds_status = known.AVAILABLE if there else known.NOT_AVAILABLE


def leave_shards(modules: Iterable[nn.Module]) -> None:
    """Let go of the shards of ``modules``, which `watch` then finds gone."""
    for module in modules:
        for name in releasable(module):
            leave(module._parameters[name])


def held_in(parameter: Tensor) -> Tensor:
    """What holds it on this rank: its shard, where it lies in shards."""
    return parameter.ds_tensor if loading.is_sharded(parameter) else parameter


def shape_of(parameter: Tensor) -> torch.Size:
    return parameter.ds_shape if loading.is_sharded(parameter) else parameter.shape


def share_of(stored: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor, what this rank holds of ``parameter``: the last shards end before their memory does."""
    if not loading.is_sharded(parameter):
        return stored
    size = parameter.ds_tensor.numel()
    return stored.flatten()[dist.rank() * size :][:size]


def is_released(parameter: Tensor) -> bool:
    held = held_in(parameter)
    return held.numel() > 1 and held.untyped_storage().nbytes() == held.element_size()
