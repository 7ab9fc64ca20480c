"""A small world in which every method trains: two models, labelled and captioned pictures, a configuration for each.

A method is known by its name in METHODS alone.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from folders import as_label, colour_folder, rewrite

from mitrain.methods.base import Adapter
from mitrain.training import schema
from mitrain.training.build import build

SMALL: dict[str, dict[str, Any]] = {
    "pmf": {"fusion_layers": 1},
    "mope": {"length": 2, "experts": 2, "standardize": True},
    "aurora": {"rank": 4},
    "lora": {"where": "both", "rank": 2},
    "prompt": {"tokens": 2},
    "prefix": {"tokens": 2},
    "visual-prefix": {"tokens": 4},
    "gated-xattn": {"heads": 2, "head_dim": 4, "feed_forward": 1},
    "vlora": {"rank": 2, "width": 8, "heads": 2},
    "uniadapter": {"width": 4},
}
"""Settings of methods whose defaults are large for tiny models; a method that is not here is taken as it is."""


def section(method: str) -> dict[str, Any]:
    """The configuration's section ``adapter`` for tiny models."""
    return {"name": method, **SMALL.get(method, {})}


def make_world(path: Path) -> Path:
    colour_folder(path, layers=2)
    rewrite(path / "data", as_label, "labels-")
    rewrite(path / "data", lambda row: as_label(row) | {"text": f"a {row['answer']} square"}, "captions-")
    return path


@cache
def untrained(world: Path, method: str) -> Adapter:
    """The method on the world's models without weights: what it has to read, and how many numbers it holds."""
    return build(schema.from_dict(settings(world, method, ["last", "image"], "classify")), empty=True).adapter


def has_joint(world: Path, method: str) -> bool:
    """Whether the method makes a state of text and picture together."""
    adapter = untrained(world, method)
    return adapter.traits.text_depends_on_input or adapter.attachment.joint_width > 0


def configured(world: Path, method: str, task: str, /, **changes: dict[str, Any]) -> Path:
    """A configuration's file; ``changes``: keys of a section, by its name."""
    joint = untrained(world, method).attachment.joint_width
    config = settings(world, method, ["joint"] if joint else ["last", "image"], task)
    for part, values in changes.items():
        config[part] = {**config[part], **values}
    path = world / f"{task}-{method}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def settings(world: Path, method: str, readout: list[str], task: str) -> dict[str, Any]:
    files = "captions" if task == "retrieve" else "labels"
    tasks = {
        "classify": {"name": "classify", "readout": readout},
        "retrieve": {"name": "retrieve", "readout": ["mean"], "dim": 8, "rerank": 2},
    }
    if task == "retrieve":
        tasks[task]["matching"] = int(has_joint(world, method))
    kinds = {"classify": "labelled", "retrieve": "captions"}
    return {
        "name": f"{task}-{method}",
        "model": {"llm": str(world / "llm"), "encoders": {"image": {"name": str(world / "vision"), "pool": "cls"}}},
        "adapter": section(method),
        "features": {"views": 2},
        "task": tasks[task],
        "data": {
            "name": kinds[task],
            "root": str(world / "data"),
            "splits": {split: f"{files}-{split}.jsonl" for split in ("train", "val", "test")},
        },
        "train": {"steps": 4, "batch": 6, "lr": 1e-2, "eval_every": 2, "save_every": 2},
    }
