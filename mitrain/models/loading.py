"""How a Hugging Face model is loaded safely, and what its parameters are."""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from mitrain.core import prepared
from mitrain.core.errors import ConfigError, ModelError

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 3  # tensors that a message names


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
    """``factory.from_pretrained(source)`` with remote code off and every failure told in one line; weights: `load_model`.

    A checkpoint cannot switch remote code on: the argument is always False. No hub is asked: a mistyped name would be
    looked for there for a minute, and found where somebody else has taken it.
    """
    local = {"trust_remote_code": False, "local_files_only": True}
    return attempt(lambda place: factory.from_pretrained(place, **local, **kwargs), source, what)


def attempt(read: Callable[[str], Any], source: str | Path, what: str) -> Any:
    """``read(source)``; ModelError for whatever transformers raises of a folder, an id or a file."""
    local = Path(source).expanduser()
    source = str(local) if os.path.exists(local) else str(source)
    try:
        with quiet():
            return read(source)
    except Exception as error:  # transformers raises many kinds for a bad folder, id or file
        log.debug("loading %s", source, exc_info=True)
        if not prepared.is_here(source):
            raise ModelError(f"cannot load the {what}: {source!r} {prepared.not_here(source)}") from None
        reason = " ".join(str(error).split()).rstrip(".")[:240] or type(error).__name__
        raise ModelError(
            f"cannot load the {what} {source!r}: {reason}. Give a prepared name (mitrain models list), a folder"
            " written by save_pretrained, or a Hugging Face id that hf download has brought"
        ) from None


def find(source: str | Path, name: str) -> Path | None:
    """The file ``name`` of a folder, or of a Hugging Face id in the local cache; None where it has none."""
    local = Path(source).expanduser()
    if os.path.isdir(local):  # False for a name that no file can have, where pathlib raises
        return local / name if (local / name).is_file() else None
    try:
        file = cached_file(str(source), name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return Path(file) if file else None


def read_config(source: str | Path, what: str) -> PretrainedConfig:
    """A model's configuration, once it is sure that loading its weights runs nobody's code and adds nobody's adapter.

    How attention is computed is not the folder's to say: give `load_model` this configuration.
    """
    if find(source, "adapter_config.json"):
        raise ModelError(
            f"the {what} {str(source)!r} has an adapter beside it (adapter_config.json), which PEFT would attach where it is"
            " installed: give a folder with the base's own files alone, or merge the adapter into it"
        )
    config = load(AutoConfig, source, f"{what}'s configuration")
    if kernel := next(kernels_of(written_config(source, what)), None):
        raise ModelError(
            f"the config.json of the {what} {str(source)!r} names code to be fetched and run ({kernel}): remove that key"
        )
    config._attn_implementation = None
    return config


def written_config(source: str | Path, what: str) -> dict[str, Any]:
    """What a model's config.json says, without transformers' defaults for what it does not say."""
    read = lambda place: PretrainedConfig.get_config_dict(place, local_files_only=True)  # noqa: E731
    return attempt(read, source, f"{what}'s configuration")[0]


def kernels_of(values: Any, key: str = "") -> Iterator[str]:
    """Every 'key=owner/kernel' in a configuration file that makes transformers fetch a kernel from its hub."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from kernels_of(value, f"{key}.{name}" if key else name)
    elif "implementation" in key and "/" in str(values):
        yield f"{key}={str(values)[:80]!r}"


def load_model(
    factory: Any, source: str | Path, what: str, used: Callable[[str], bool] = lambda name: True, **kwargs: Any
) -> PreTrainedModel:
    """`load` for weights: ModelError where a tensor that is ``used`` is missing, of another shape, or not finite.

    What is missing and not used is zero, so that every process has the same model. A causal language model without its
    head comes as what is below it. Tensors that have no place in the model are told in one line.
    """
    options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = load(factory, source, what, **options, **kwargs)
    check_shapes(report["mismatched_keys"], source, what)
    missing, unplaced = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    needed = [name for name in missing if used(name)]
    if needed and set(needed) == set(head_names(model)):
        log.warning("the %s %s has no language head (%s): it is used without", what, source, ", ".join(needed))
        model, needed = model.base_model, []
    if needed:
        other = f", and {counted(unplaced)} that the model has no place for" if unplaced else ""
        raise ModelError(
            f"the {what} {str(source)!r} lacks {counted(needed)} that its config.json promises{other}: give the whole"
            " checkpoint, its tensors under their own names, or the config.json that belongs to it"
        )
    tell_unplaced(unplaced, source, what)
    for name, tensor in model.state_dict().items():
        if name in missing:
            tensor.zero_()
        check_finite(name, tensor, source, what)
    return model


def head_names(model: PreTrainedModel) -> list[str]:
    """The names of the language head's own tensors."""
    head = model.get_output_embeddings()
    own = {id(p) for p in head.parameters()} if head is not None else set()
    return [name for name, p in model.named_parameters() if id(p) in own]


def counted(names: Collection[str]) -> str:
    """As '5 tensors (a, b, c, …)'."""
    shown = ", ".join(list(names)[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({shown})"


def tell_unplaced(names: Collection[str], source: str | Path, what: str) -> None:
    if names:
        log.warning("the %s %s has %s that the model has no place for: not used", what, source, counted(names))


def check_shapes(mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]], source: str | Path, what: str) -> None:
    """ModelError where ``mismatched`` holds any (name, shape in the file, shape by the configuration)."""
    wrong = [f"{name} is {tuple(there)}, not {tuple(here)}" for name, there, here in sorted(mismatched)]
    if wrong:
        raise ModelError(
            f"the {what} {str(source)!r} has {counted(wrong)} of other shapes than its config.json says: give weights and"
            " configuration of the same model"
        )


def check_finite(name: str, tensor: Tensor, source: str | Path, what: str) -> None:
    """ModelError where a tensor of a checkpoint holds NaN or infinity."""
    if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
        low, high = torch.aminmax(tensor.detach())  # one pass without a copy; NaN goes through both
        if not (low.isfinite() and high.isfinite()):
            raise ModelError(
                f"the {what} {str(source)!r} has weights that are not finite (the first in {name}, as"
                f" {str(tensor.dtype).removeprefix('torch.')}): its checkpoint is damaged, or model.dtype too narrow"
            )


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


def weightless(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration without storage (meta device), and without what is attached to ``model``."""
    with torch.device("meta"), quiet():
        return type(model)(copy.deepcopy(model.config))  # attaching changes it


def agree(actual: Tensor, expected: Tensor) -> bool:
    """Whether two ways of computing the same numbers gave the same but for rounding, measured by the largest of them."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return False
    bound = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    return float((actual - expected).abs().max()) <= bound


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read at once; None where its configuration names no bound.

    A table of positions with a padding index, as RoBERTa's, counts from behind that index.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padded = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return limit - max(padded, default=0) if limit else None


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
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


def holds_shards(module: nn.Module) -> bool:
    """Whether a frozen module's weights lie in shards on all ranks, which then must run it together."""
    first = next(module.parameters(), None)
    return first is not None and is_sharded(first)


def elements(parameter: Tensor) -> int:
    """How many elements the whole parameter has, also where this rank holds a shard of it."""
    return parameter.ds_numel if is_sharded(parameter) else parameter.numel()


def device_of(device: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means here; ConfigError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device=cuda, but torch sees no GPU: set model.device=cpu or install a CUDA build of torch")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def count_parameters(module: nn.Module) -> int:
    """Distinct parameters, tied ones once."""
    return sum(elements(p) for p in {id(p): p for p in module.parameters()}.values())
