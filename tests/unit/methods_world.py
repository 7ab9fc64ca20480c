"""A small world in which every method trains: two models, labelled and captioned pictures, a configuration for each."""

import json
from pathlib import Path
from typing import Any

import yaml
from folders import colour_records, llm_folder, vision_folder

METHODS = {
    "pmf": ({"name": "pmf", "fusion_layers": 1}, ["last", "image"]),
    "mope": ({"name": "mope", "length": 2, "experts": 2}, ["joint"]),
    "aurora": ({"name": "aurora", "rank": 4}, ["joint"]),
    "lora": ({"name": "lora", "where": "both", "rank": 2}, ["mean", "image"]),
    "ia3": ({"name": "ia3"}, ["mean", "image"]),
    "prompt": ({"name": "prompt", "tokens": 2}, ["mean", "image"]),
    "prefix": ({"name": "prefix", "tokens": 2}, ["mean", "image"]),
    "visual-prefix": ({"name": "visual-prefix", "tokens": 4}, ["last"]),
    "full": ({"name": "full"}, ["mean", "image"]),
    "none": ({"name": "none"}, ["mean", "image"]),
}
ALONE = ("lora", "full", "none")
"""Methods without a state of text and picture together."""


def make_world(path: Path) -> Path:
    llm_folder(path / "llm", width=32, layers=2)
    vision_folder(path / "vision", layers=2)
    colour_records(path / "data", train=12, val=4)
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (path / "data" / f"{split}.jsonl").read_text().splitlines()]
        made = [
            {"image": r["image"], "text": "this thing is", "label": r["answer"], "object": r["object"]} for r in rows
        ]
        captions = [row | {"text": f"a {row['label']} square"} for row in made]
        for name, content in (("labels", made), ("captions", captions)):
            (path / "data" / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def configured(world: Path, method: str, task: str, /, **changes: dict[str, Any]) -> Path:
    """A configuration's file; ``changes``: keys of a section, by its name."""
    adapter, readout = METHODS[method]
    files = "captions" if task == "retrieve" else "labels"
    tasks = {
        "classify": {"name": "classify", "readout": readout},
        "retrieve": {
            "name": "retrieve",
            "readout": ["mean"],
            "dim": 8,
            "rerank": 2,
            "matching": int(method not in ALONE),
        },
    }
    kinds = {"classify": "labelled", "retrieve": "captions"}
    config = {
        "name": f"{task}-{method}",
        "model": {"llm": str(world / "llm"), "vision": [{"name": str(world / "vision"), "pool": "cls"}]},
        "adapter": adapter,
        "features": {"views": 2},
        "task": tasks[task],
        "data": {
            "name": kinds[task],
            "root": str(world / "data"),
            "splits": {split: f"{files}-{split}.jsonl" for split in ("train", "val", "test")},
        },
        "train": {"steps": 4, "batch": 6, "lr": 1e-2, "eval_every": 2, "save_every": 2},
    }
    for section, values in changes.items():
        config[section] = {**config[section], **values}
    path = world / f"{task}-{method}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
