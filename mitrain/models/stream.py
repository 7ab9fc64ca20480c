"""Loading a model's safetensors layer by layer into an empty one, low-bit layers included.

The model is made on the meta device, its linear layers are exchanged for empty low-bit ones, and then each layer is
read, quantised and handed to ``after`` (which may shard it) before the next is read: what exists in full precision is
one layer at most. The embedding, the head and the last norm are layers in this sense. Of several ranks one reads
(``reads``); the others make room for each layer, which ``after`` fills on its way into the shards.

Checkpoints in which bitsandbytes' int8 or nf4 stands beside the names are taken over without it.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from mitrain.core import parsing
from mitrain.core.errors import ModelError
from mitrain.models import layouts, loading
from mitrain.models.quant import FrozenInt8Linear, FrozenLinear
from mitrain.models.quant.convert import INT8_PARTS, NF4_PARTS, fill_int8, fill_nf4, stored_as
from mitrain.models.quant.replace import linear_refs, quantise, quantise_embedding, quantised

log = logging.getLogger(__name__)
After = Callable[[str, nn.Module], object]
Shard = Callable[[nn.Module], object]
"""Spreads a module's weights over all ranks; those of rank 0 count."""
Unread = Callable[[PreTrainedModel], Collection[nn.Module]]
"""Of an empty model, the modules whose own weights are left in the checkpoint until they are called."""
Stamp = tuple[str, int, int, int]
FILES = ("model.safetensors.index.json", "model.safetensors")


def keep(name: str, module: nn.Module) -> None:
    """Leave a loaded layer as it is."""


def nothing(model: nn.Module) -> Collection[nn.Module]:
    """Every weight is read."""
    return ()


class Weights:
    """The tensors of a safetensors checkpoint by name, each read when it is asked for."""

    def __init__(self, files: dict[str, Path]):
        self.files = files

    @classmethod
    def of(cls, source: str | Path) -> "Weights | None":
        """Those of a folder or of a Hugging Face id in the local cache; None where there are no safetensors."""
        for name in FILES:
            path = loading.find(source, name)
            if path is not None and path.suffix == ".json":
                table = weight_map(path)
                files = {file: loading.find(source, file) for file in set(table.values())}
                return cls({tensor: files[file] for tensor, file in table.items()}) if all(files.values()) else None
            if path is not None:
                with safe_open(path, "pt") as file:
                    return cls(dict.fromkeys(file.keys(), path))
        return None

    @property
    def names(self) -> set[str]:
        return set(self.files)

    def read(self, name: str) -> Tensor:
        """A tensor, in a memory map of its file: copy what is to stay.

        Each has a map of its own (.6 ms), or all pages that were ever read would count as the process's memory.
        """
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def stamps(self) -> list[Stamp]:
        """What tells that a file was replaced."""
        return [stamp(path) for path in sorted(set(self.files.values()))]

    def checked(self, name: str, shape: Sequence[int]) -> Tensor:
        """`read`; ModelError where it is of another shape or not finite."""
        tensor, folder = self.read(name), self.files[name].parent
        if tensor.shape != torch.Size(shape):
            loading.check_shapes([(name, tensor.shape, shape)], folder, "model in")
        loading.check_finite(name, tensor, folder, "model in")
        return tensor


def stamp(path: Path) -> Stamp:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns, status.st_ino


def weight_map(path: Path) -> dict[str, str]:
    """Of a checkpoint in several files, each tensor's file. Raises ModelError."""
    try:
        table = parsing.read_json(path)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{str(path)!r} is no index of weights ({error}): get the original file") from None
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise ModelError(f"{str(path)!r} is no index of weights (it names no files): get the original file")
    return table


def stored_precision(config: PretrainedConfig, source: str | Path) -> str | None:
    """``int8`` or ``nf4`` for a checkpoint quantised by bitsandbytes, None for floats; ModelError for other methods."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if method == "bitsandbytes" and values.get("load_in_8bit"):
        return "int8"
    if method == "bitsandbytes" and values.get("load_in_4bit") and values.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    raise ModelError(
        f"{str(source)!r} is quantised by {method}, which mitrain does not read: give its weights in floats, or in"
        " bitsandbytes' int8 or nf4"
    )


def load(
    factory: Any,
    source: str | Path,
    dtype: torch.dtype,
    precision: str,
    *,
    embedding: bool = False,
    device: torch.device | str = "cpu",
    after: After = keep,
    reads: bool = True,
    used: Callable[[str], bool] = lambda name: True,
    unread: Unread = nothing,
    **kwargs: Any,
) -> PreTrainedModel:
    """A frozen model in ``precision`` on ``device``; everything that is not low-bit is in ``dtype``.

    A checkpoint whose names are not the model's own is loaded whole by transformers and quantised then (``used``: see
    `mitrain.models.loading.load_model`). What is ``unread`` holds placeholders, which `mitrain.models.release.watch` has
    filled. ``kwargs`` go to the model's constructor.
    """
    config = loading.read_config(source, "language model")
    stored, weights = stored_precision(config, source), Weights.of(source)
    if weights is not None:
        model = empty(factory, config, weights, precision, embedding, dtype=dtype, **kwargs)
        if fits(model, weights):
            loading.tell_unplaced(unplaced(model, weights), source, "language model")
            fill(model, weights, device, after, reads, unread(model))
            if loading.find(source, "generation_config.json"):
                model.generation_config = loading.load(GenerationConfig, source, "generation settings")
            return model
    if stored:
        raise ModelError(f"the {stored} checkpoint {str(source)!r} has names that its model has not: give float weights")
    log.info("%s is loaded whole, on every rank: its tensors have other names than its model's", source)
    model = loading.load_model(factory, source, "language model", used, config=config, dtype="auto", **kwargs)
    loading.freeze(model)
    model = (model if precision == "none" else quantise(model, precision, embedding=embedding)).to(device, dtype)
    for name, unit in units(model):
        after(name, unit)
    return model


def empty(
    factory: Any, config: PretrainedConfig, weights: Weights, precision: str, embedding: bool, **kwargs: Any
) -> PreTrainedModel:
    """The model on the meta device with empty low-bit layers where ``precision``, or the checkpoint, has them."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = loading.empty_model(factory, config, **kwargs)
    loading.freeze(model)
    stored = {name: kind for name, _ in model.named_modules() if (kind := stored_as(weights.names, name))}
    if not stored:
        return model if precision == "none" else quantise(model, precision, embedding=embedding)
    refs = {ref.name: ref for ref in linear_refs(model)}
    if set(stored) - set(refs):
        outside = sorted(set(stored) - set(refs))[0]
        raise ModelError(f"{outside} is quantised, which is read inside the decoder's layers alone: leave it in floats")
    for name in stored:
        refs[name].put(quantised(refs[name].module, precision))
    if embedding:
        quantise_embedding(model)
    return model


def fits(model: PreTrainedModel, weights: Weights) -> bool:
    """Whether every tensor of the empty ``model`` is in the checkpoint under its own name, or can be computed.

    Fills the buffers that are computed.
    """
    return set(map(source_of, tensors(model))) <= weights.names | tied_names(model) and fill_buffers(model)


def unplaced(model: PreTrainedModel, weights: Weights) -> list[str]:
    """The names in a checkpoint that `fits` which the model has no place for, but for those its class knows of."""
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    low_bit = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FrozenLinear))
    left = weights.names - set(map(source_of, tensors(model)))
    return sorted(n for n in left if not n.startswith(low_bit) and not any(re.search(k, n) for k in known))


def tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(module's name, module, tensor's name) of what a checkpoint must hold; of low-bit layers the weight alone."""
    for name, module in model.named_modules():
        kept = {n for n in module._buffers if n not in module._non_persistent_buffers_set}
        for own in [*module._parameters, *kept]:
            if getattr(module, own) is not None and not (isinstance(module, FrozenLinear) and own != "qweight"):
                yield name, module, own
        if isinstance(module, FrozenLinear) and module.bias is not None:
            yield name, module, "bias"


def source_of(place: tuple[str, nn.Module, str]) -> str:
    name, module, own = place
    own = "weight" if isinstance(module, FrozenLinear) and own == "qweight" else own
    return f"{name}.{own}" if name else own


def tied_names(model: nn.Module) -> set[str]:
    """The names under which a tensor stands a second time."""
    seen: set[int] = set()
    again = set()
    for place in tensors(model):
        tensor = getattr(place[1], place[2])
        again |= {source_of(place)} if id(tensor) in seen else set()
        seen.add(id(tensor))
    return again


def fill_buffers(model: PreTrainedModel) -> bool:
    """Compute the buffers that no checkpoint holds (rotary frequencies), by transformers' own initialisation."""
    for module in model.modules():
        computed = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
        if computed and any(True for _ in module.parameters(recurse=False)):
            return False
        for name in computed:
            buffer = module._buffers[name]
            if not buffer.is_floating_point():
                return False
            module._buffers[name] = torch.full_like(buffer, torch.nan, device="cpu")
        if computed:
            model._init_weights(module)
        if any(bool(module._buffers[name].isnan().any()) for name in computed):
            return False
    return True


def fill(
    model: PreTrainedModel,
    weights: Weights,
    device: torch.device | str = "cpu",
    after: After = keep,
    reads: bool = True,
    unread: Collection[nn.Module] = (),
) -> None:
    """Read every tensor of the empty ``model`` that `fits`, layer by layer; ``after(name, layer)`` once each is whole.

    Without ``reads`` parameters get memory and no content; buffers, which are small and never sharded, are read.
    ``unread``: modules whose own parameters `mitrain.models.release` reads when they are called.
    """
    done: dict[int, nn.Parameter] = {}
    layers = layers_of(model)
    for name, unit in units(model):
        inside = unit.named_modules(prefix=name) if unit in layers else [(name, unit)]
        for path, module in inside:
            if module in unread and can_wait(path, module, weights):
                make_room(module, torch.device(device), done, placeholder)
            elif reads:
                fill_parameters(path, module, weights, torch.device(device), done)
            else:
                make_room(module, torch.device(device), done)
            fill_buffers_of(path, module, weights, torch.device(device))
        after(name, unit)


def make_room(
    module: nn.Module, device: torch.device, done: dict[int, nn.Parameter], room: Callable[..., Tensor] = torch.empty_like
) -> None:
    """Memory for one module's parameters, tied ones once; ``done`` as in `fill_parameters`."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            if id(parameter) not in done:
                done[id(parameter)] = nn.Parameter(room(parameter, device=device), requires_grad=False)
            module._parameters[name] = done[id(parameter)]


def placeholder(like: Tensor, device: torch.device) -> Tensor:
    """NaN (of integers 0) in the shape and type of ``like``, in the memory of one element."""
    fill = torch.nan if like.is_floating_point() else 0
    return torch.full((1,), fill, dtype=like.dtype, device=device).expand(like.shape)


def can_wait(path: str, module: nn.Module, weights: Weights) -> bool:
    """Whether a module's own parameters can be read later: each is in the checkpoint, and large enough to be told from one
    that was read."""
    low_bit = isinstance(module, FrozenLinear)
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    names = {f"{path}.weight" if low_bit and name != "bias" else f"{path}.{name}" for name in own}
    return names <= weights.names and all(p.numel() > 1 for p in module.parameters(recurse=False))


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers; none in a convolutional encoder."""
    return list(layouts.layers_of(model)) if layouts.layer_lists(model) else []


def units(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Each transformer layer, and each module outside of them with tensors of its own, after those that it holds.

    What is done to a module is done to all in it, whose tensors must be there by then.
    """
    layers = layers_of(model)
    inside = {module for layer in layers for module in layer.modules()}
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if module in layers or (own and module not in inside):
            found.append((name, module))
    modules = {module for _, module in found}
    holders = [pair for pair in found if pair[1] not in layers and len(modules & set(pair[1].modules())) > 1]
    yield from (pair for pair in found if pair not in holders)
    yield from reversed(holders)


def fill_parameters(
    path: str, module: nn.Module, weights: Weights, device: torch.device, done: dict[int, nn.Parameter]
) -> None:
    """One module's own parameters. ``done``: empty parameter → filled one, so that tied ones stay one."""
    before = dict(module._parameters)
    if isinstance(module, FrozenLinear) and id(module.qweight) not in done:
        fill_low_bit(path, module, weights, device)
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta and id(parameter) not in done:
            value = weights.checked(f"{path}.{name}", parameter.shape).to(device, parameter.dtype, copy=True)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    for name, parameter in before.items():
        if parameter is not None:
            module._parameters[name] = done.setdefault(id(parameter), module._parameters[name])


def fill_buffers_of(path: str, module: nn.Module, weights: Weights, device: torch.device) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            place = f"{path}.{name}"
            held = weights.checked(place, buffer.shape).to(buffer.dtype, copy=True) if buffer.is_meta else buffer
            module._buffers[name] = held.to(device)


def fill_low_bit(path: str, layer: FrozenLinear, weights: Weights, device: torch.device) -> None:
    """The payload: taken over from bitsandbytes' format, or quantised from floats."""
    if stored_as(weights.names, path) is None:
        return layer.fill(weights.checked(f"{path}.weight", (layer.out_features, layer.in_features)).to(device))
    parts, take = (INT8_PARTS, fill_int8) if isinstance(layer, FrozenInt8Linear) else (NF4_PARTS, fill_nf4)
    held = {p: weights.read(f"{path}.{p}").to(device, copy=True) for p in parts if f"{path}.{p}" in weights.names}
    return take(layer, held, path)
