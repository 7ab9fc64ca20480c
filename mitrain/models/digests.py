"""What decides what a frozen model computes, as named parts that a run keeps and later processes compare.

Weights count as they lie on the disk: a base is then the same in every precision, on every device and in however many
files. What is made of them depends on the model's configuration, and on its tokenizer.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mitrain.core.provenance import digest
from mitrain.models import loading, release
from mitrain.models.stream import Weights

PEFT = "text.peft"
NO_MATTER = ("_name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Of a model's configuration: what changes nothing that is computed, or what a run's own configuration says."""
PROBE = "Zwölf Boxkämpfer: 2048 «naïve» foxes, didn't they?\n\tdef f(x): return x**2  # ✓ 你好"


def frozen_digest(module: nn.Module) -> str:
    """sha256 over a frozen module's tensors as they are held: the name of its weights in the caches."""
    seen = hashlib.sha256()
    with release.whole(module):
        for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
            with loading.gathered([tensor]):
                add(seen, name, tensor)
    return seen.hexdigest()


def add(seen: Any, name: str, tensor: Tensor) -> None:
    seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    seen.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def tensor_digest(name: str, tensor: Tensor) -> bytes:
    seen = hashlib.sha256()
    add(seen, name, tensor)
    return seen.digest()


def weights_of(source: str | Path | None, model: nn.Module) -> str:
    """A digest of the weights in the folder (or cached id) ``source``; of the loaded ``model`` where it has no source."""
    weights = None if source is None else Weights.of(source)
    if weights is None:
        return frozen_digest(model)
    return stored_digest(str(source), tuple(weights.stamps()))


@cache
def stored_digest(source: str, stamps: tuple) -> str:
    """sha256 over the tensors of a checkpoint, by name, on all cores; once per process while its files stay the same."""
    weights = Weights.of(source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        names = sorted(weights.names)  # `map`, unlike `submit`, leaves the rest undone on an interruption
        digests = pool.map(lambda name: tensor_digest(name, weights.read(name)), names)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def settings_of(config: PretrainedConfig, source: str | Path | None) -> dict[str, Any]:
    """What a model's configuration says, as ``settings`` and ``config.json``; one of them that is the same is enough.

    ``settings`` is what its class does not say by itself: another transformers may give it other defaults, while the file
    stays as it was. ``config.json`` is the file's own words, which a copy saved by transformers says in others.
    """
    settings = {"settings": without(config.to_diff_dict(), NO_MATTER)}
    if source is not None:
        settings["config.json"] = without(loading.written_config(source, "model"), NO_MATTER)
    return settings


def stored_base(source: str | Path) -> dict[str, Any] | None:
    """What `TextBackbone.base` says of a language model in the folder (or cached id) ``source``, but for the tokenizer.

    None where ``source`` holds no weights.
    """
    if not str(source) or Weights.of(source) is None:
        return None
    config = loading.read_config(source, "language model")
    return {"weights": weights_of(source, nn.Module()), **settings_of(config, source)}


def stored_digests(model: PreTrainedModel, adapter: nn.Module | None = None) -> dict[str, str]:
    """Digests of the files that a language ``model`` in memory was read from, none where it names none, and as
    text.peft of PEFT's adapters in it: what an ``adapter`` beside them is trained on."""
    own = {id(tensor) for tensor in adapter.parameters()} if adapter else set()
    beside = [(name, tensor_digest(name, t).hex()) for name, t in peft_tensors(model) if id(t) not in own]
    parts = (stored_base(model.name_or_path) or {}) | ({"peft": beside} if beside else {})
    return named_digests("text", parts)


def peft_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors that PEFT's layers in ``model`` add, by name."""
    owners = {name: m for name, m in model.named_modules() if getattr(m, "adapter_layer_names", ())}
    added = [f"{owner}.{part}." for owner, module in owners.items() for part in module.adapter_layer_names]
    return [pair for pair in sorted(model.state_dict(keep_vars=True).items()) if pair[0].startswith(tuple(added))]


def named_digests(name: str, parts: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what decides what a frozen model computes, as NAME.PART."""
    return {f"{name}.{part}": digest([value]) for part, value in parts.items()}


def without(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {k: without(v, names) if isinstance(v, dict) else v for k, v in values.items() if k not in names}


def tokenizer_of(tokenizer: Any) -> list[Any]:
    """The vocabulary, the ids with a meaning of their own, and what becomes of a text with a little of everything."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return [sorted(tokenizer.get_vocab().items()), special, tokenizer(PROBE)["input_ids"]]
