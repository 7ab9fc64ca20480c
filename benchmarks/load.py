"""``mitrain bench load``: what loading a model in shards takes at its peak, on a random model of two gigabytes or more.

Counted are bytes of tensor storages that exist at the same time, above those before the load: not the process's resident
size, in which freed memory stays. The limit is that of a loader which never holds two layers: 1.2 × (the shards + one
layer in full precision), where the embedding counts as a layer.
"""

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import ranks, results
from mitrain.core import dist, markdown
from mitrain.core.errors import UserError
from mitrain.core.files import write_json
from mitrain.core.provenance import made_with, sentence
from mitrain.models import loading, stream
from mitrain.training.engine import OptimizerConfig, ZeroConfig
from mitrain.training.engine.zero import sharding

PRECISIONS = ("none", "int8", "nf4")
LIMIT = 1.2
SHAPE = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8,
         "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
QUICK = {**SHAPE, "hidden_size": 512, "intermediate_size": 1408, "vocab_size": 8000}
LIMIT_S = 3600.0
PACKAGES = ("torch", "deepspeed", "transformers")


class LoadError(UserError):
    """A rank took more than the limit; everything has been written."""

    exit_code = 1


class Tracked(TorchDispatchMode):
    """Bytes of the storages that torch's operators make inside: ``now`` and at the ``peak``. Views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and key(tensor) not in given:
                self._take(tensor)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        name, size = key(tensor), storage.nbytes()
        if name in self._seen or tensor.is_meta or not size:
            return
        self._seen.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, name, size)

    def _free(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.now -= size


def key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def make_model(folder: Path, shape: dict[str, Any]) -> int:
    """A model of random float32 weights in ``folder``, a safetensors file a layer; its bytes."""
    from transformers import AutoModelForCausalLM

    config = loading.config_from_shape(shape, "the shape")
    torch.manual_seed(0)
    with loading.quiet():
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, max_shard_size="300MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def largest_layer(folder: Path) -> int:
    """Bytes of the largest layer in the checkpoint's own precision."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = loading.empty_model(AutoModelForCausalLM, loading.load(AutoConfig, folder, "configuration"))
    return max(sum(p.numel() * 4 for p in unit.parameters()) for _, unit in stream.units(model))


def measure(folder: str, precision: str) -> dict[str, Any]:
    """One rank: its peak while it loads, and its shards after."""
    from transformers import AutoModelForCausalLM

    shard = sharding(ZeroConfig(stage=3), OptimizerConfig())

    def spread(name: str, unit: nn.Module) -> None:
        shard(unit)

    with Tracked() as tracked:
        model = stream.load(AutoModelForCausalLM, folder, torch.float32, precision, after=spread, reads=dist.is_main())
        peak = tracked.peak
    held = {id(p): p.ds_tensor.untyped_storage().nbytes() for p in model.parameters()}
    whole = sum(p.ds_numel * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    return {"rank": dist.rank(), "peak": peak, "shards": sum(held.values()), "payload": whole}


def work(folder: str, precision: str, out: Path) -> None:
    with dist.process_group():
        rows = dist.gather(measure(folder, precision))
        dist.from_main(lambda: write_json(out, rows))


def load(count: int = 2, shape: dict[str, Any] = SHAPE) -> dict[str, Any]:
    """Rows of every precision and of ``count`` ranks, made in processes of their own on a model in a temporary folder."""
    ranks.need_deepspeed("load")
    with tempfile.TemporaryDirectory(prefix="mitrain-load-") as temporary:
        folder = Path(temporary)
        size, layer = make_model(folder, shape), largest_layer(folder)
        rows = []
        for precision in PRECISIONS:
            for row in ranks.found(work, (str(folder), precision), count, LIMIT_S):
                limit = round(LIMIT * (row["shards"] + layer))
                rows.append({"precision": precision, **row, "layer": layer, "limit": limit, "ok": row["peak"] <= limit})
    return {"model_bytes": size, "ranks": count, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Markdown, in MiB."""
    head = ["precision", "rank", "peak", "shards", "one layer", "limit", "peak / limit", ""]
    lines = []
    for row in found["rows"]:
        sizes = [f"{row[name] / 2**20:,.0f}" for name in ("peak", "shards", "layer", "limit")]
        precision = "fp32" if row["precision"] == "none" else row["precision"]
        verdict = "ok" if row["ok"] else "above"
        lines.append([precision, str(row["rank"]), *sizes, f"{row['peak'] / row['limit']:.2f}", verdict])
    return "\n".join(markdown.table(head, lines))


def check(found: dict[str, Any]) -> None:
    """LoadError where a rank's peak is above its limit."""
    above = [f"{row['precision']} rank {row['rank']}" for row in found["rows"] if not row["ok"]]
    if above:
        raise LoadError(f"loading took more than {LIMIT} × (shards + one layer): {', '.join(above)}")


def write(found: dict[str, Any], out: Path, command: str) -> None:
    made = {"command": command, **made_with(PACKAGES), "machine": ranks.machine()}
    note = (
        "MiB of tensors of a rank above those before the load, of a random float32 Llama of"
        f" {found['model_bytes'] / 1e9:.2f} GB on {found['ranks']} ranks."
        f" Limit: {LIMIT} × (this rank's shards + one float32 layer, the largest being the embedding). {sentence(made)}"
    )
    results.write(out, {"made": made, **found}, f"{table(found)}\n\n{note}\n")
