"""A run folder made by hand (tiny models, random trained tensors, two checkpoints) and what is exported of it."""

import json
from pathlib import Path
from typing import Any

import torch
from folders import colour_folder
from tiny import scramble

from mitrain.methods import export_format
from mitrain.training import checkpoint, runs, schema
from mitrain.training.build import build
from mitrain.training.schema import RunConfig

BEST, LAST = 4, 6
PROMPT = "the colour of this picture is"
TASKS: dict[str, dict[str, Any]] = {
    "answer": {"task": {"name": "answer"}},
    "dialogue": {"task": {"name": "answer", "turn": "{prompt} {answer} and "}},
    "segment": {
        "task": {"name": "segment", "readout": ["mean"], "dim": 8, "heads": 2, "ffn": 16},
        "data": {"name": "refcoco", "root": "no/such/folder"},
    },
}


def make_world(path: Path) -> Path:
    return colour_folder(path, train=8, val=4, layers=2)


def make_config(world: Path, task: str = "answer", adapter: dict[str, Any] | None = None) -> RunConfig:
    vision = {"name": str(world / "vision"), "size": 56, "layer": 2, "pool": "cls+mean", "resize": "pad"}
    vision |= {"levels": [2]} if task == "segment" else {}
    return schema.from_dict(
        {
            "name": "colours",
            "model": {
                "device": "cpu",
                "llm": str(world / "llm"),
                "encoders": {"image": vision},
            },
            "adapter": adapter or {"name": "mit", "layers": [1], "rank": 3},
            "data": {"name": "records", "root": str(world / "data")},
            "wandb": {"project": "secret"},
            **TASKS[task],
        }
    )


def make_run(world: Path, task: str = "answer", adapter: dict[str, Any] | None = None) -> Path:
    """A run of ``task`` whose trained tensors are random, with its best checkpoint at step 4 and its last at step 6."""
    config = make_config(world, task, adapter)
    folder = runs.create(config, world / "runs")
    model = build(config)
    lines, state = [], {"fingerprint": {f"base.{name}": value for name, value in model.base.items()}}
    for step in (BEST, LAST):
        for module in model.trainable.values():
            scramble(module, seed=step, spread=0.5)
            for buffer in module.buffers():
                buffer.add_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(step)))
        tensors = {name: checkpoint.only_trainable(module) for name, module in model.trainable.items()}
        checkpoint.save(folder, step, tensors, state, best=step == BEST)
        values = {"accuracy": step / 10, "samples": 4, "control": "none", "broken": float("nan")}
        lines += [{"kind": "train", "step": step, "loss": 1.0}, {"kind": "val", "step": step, "time": 1.0, **values}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "val", "st')
    return folder


def resigned(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` of mitrain.json with a checksum that vouches for them: what a forger would do."""
    return {**values, "checksum": export_format.folder.checksum(values)}
