"""What mitrain needs to know of a Hugging Face model's shape, and how one is loaded safely.

No architecture is named here: the decoder's layers are found as the one ``ModuleList`` whose length is
``config.num_hidden_layers``.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mitrain.errors import ConfigError, ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def layer_owner(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the stack of transformer layers, and the attribute's name."""
    found = stacks(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of layers that mitrain can find, as long as its configuration says:"
            " use a decoder of the Llama kind"
        )
    return found[0]


def stacks(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every list of as many modules as the model has layers: (the module that holds it, its name there)."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(config, "num_hidden_layers", None)
    return [
        (owner, name)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer layers, bottom first."""
    owner, name = layer_owner(model)
    return getattr(owner, name)


def freeze(model: nn.Module) -> None:
    """No gradients, no dropout."""
    model.requires_grad_(False)
    model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notices out of our one-line output."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def load(factory: Any, source: str | Path, what: str, **kwargs: Any) -> Any:
    """``factory.from_pretrained(source)`` with remote code off and every failure told in one line.

    Only safetensors weights are read. A checkpoint cannot switch remote code on: the argument is always False.
    """
    local = Path(source).expanduser()
    source = str(local) if local.exists() else str(source)
    try:
        with quiet():
            return factory.from_pretrained(source, trust_remote_code=False, **kwargs)
    except Exception as error:  # transformers raises many kinds for a bad folder, id or file
        logging.getLogger(__name__).debug("loading %s", source, exc_info=True)
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise ModelError(
            f"cannot load the {what} {source!r}: {reason}. Give a prepared name (mitrain models list), a folder"
            " written by save_pretrained, or a Hugging Face id that is already in the local cache"
        ) from None


def config_from_shape(shape: Mapping[str, Any], what: str) -> PretrainedConfig:
    """A model configuration from plain numbers (``model_type`` and what differs from its defaults)."""
    values = dict(shape)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # the config classes raise their own kinds
        raise ConfigError(
            f"{what} describes no model ({' '.join(str(error).split())[:160]}): give model_type and its sizes"
        ) from None


def empty_model(factory: Any, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """A model without storage (meta device): names, shapes and counts only."""
    with torch.device("meta"), quiet():
        return factory.from_config(config, **kwargs)


@contextlib.contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, those of ``parameters`` that are sharded over ranks (ZeRO-3) are gathered; all ranks do it together."""
    sharded = [p for p in {id(p): p for p in parameters}.values() if is_sharded(p) and not p.numel()]
    if sharded:
        sharded[0].all_gather(sharded)
    try:
        yield
    finally:
        if sharded:
            sharded[0].partition(sharded)


def is_sharded(parameter: Tensor) -> bool:
    """Whether DeepSpeed holds it in shards; gathered or not."""
    return hasattr(parameter, "ds_id")


def elements(parameter: Tensor) -> int:
    """How many elements the whole parameter has, also where this rank holds a shard of it."""
    return parameter.ds_numel if is_sharded(parameter) else parameter.numel()


def place(device: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means here; ConfigError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "model.device=cuda, but torch sees no GPU: set model.device=cpu or install a CUDA build of torch"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def count_parameters(module: nn.Module) -> int:
    """Distinct parameters, tied ones once."""
    return sum(elements(p) for p in {id(p): p for p in module.parameters()}.values())
