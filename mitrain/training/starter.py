"""A configuration for a user's own table, written with comments: ``mitrain init``."""

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mitrain.core import parsing, prepared
from mitrain.core.errors import ConfigError
from mitrain.core.files import write_atomic
from mitrain.data.arrays import read_array
from mitrain.data.guess import Guess, guess, guess_expressions, guess_folders
from mitrain.models import loading
from mitrain.training import schema, settings
from mitrain.training.build import resolve_model

LLM = ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
ENCODERS = {
    "image": ("dinov2-vits14", "facebook/dinov2-small"),
    "audio": ("whisper-base", "openai/whisper-base"),
    "video": ("dinov2-vits14", "facebook/dinov2-small"),
    "text": ("all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
}
"""Small models: the name of a prepared one, and the same on the Hugging Face Hub."""
SIZE = 224  # pixels: DINOv2's own 518 are five times as many patches to encode
FORMATS = {
    "answer": "records",
    "classify": "labelled",
    "regress": "rated",
    "caption": "captions",
    "retrieve": "captions",
    "segment": "expressions",
}
SEGMENT = {"readout": ["mean", "embeddings"], "film": "every", "coords": True, "ffn": 256, "loss": "bce+dice"}
LEVELS = [10, 7, 4]  # of the small DINOv2's twelve layers, those that the decoder sees
SPLITS = ("train", "val", "test")
STEPS, FEWEST, MOST, BATCH = 150, 3, 30, 32


def begin(
    table: Path,
    out: Path | None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    files: Path | None = None,
    llm: str | None = None,
    encoders: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Look at ``table``, write a configuration that trains on it to ``out`` and read its data once; returns what was found.

    Raises UserError, and writes nothing, where the table cannot be understood or ``out`` is there.
    """
    out = out or Path(f"{table.stem if table.stem not in SPLITS else table.resolve().parent.name}.yaml")
    if out.exists():
        raise ConfigError(f"{str(out)!r} is there: remove it, or choose another name with --out")
    if table.is_dir() and (task not in (None, "classify") or columns or files):
        raise ConfigError("a folder for each class is a classification: leave out the task, --column, --files")
    if table.is_dir():
        found = guess_folders(table)
    else:
        found = guess_expressions(table, task, columns or {}) or guess(table, task, columns or {}, files)
    values, data = values_of(found, table, out, llm, encoders or {})
    if found.task == "segment" and files:
        data["images"] = os.path.relpath(files, found.root)
    config = schema.config.parse(schema.RunConfig, values)
    counts = {split: len(config.data.read(found.root, split)) for split in config.data.split_names(found.root)}
    values["train"] = training(counts["train"]) | ({"head_lr": 3e-3} if found.task == "segment" else {})
    shown = [
        f"# A run of the task {found.task} on {table.name}, written by mitrain init on {datetime.date.today()}.",
        "# Every setting there is: mitrain config --keys",
    ]
    write_atomic(out, "\n".join([*shown, *explained(values)]) + "\n")
    schema.load(out)
    return {
        "config": str(out),
        "task": found.task,
        "inputs": found.inputs,
        "columns": {**data.get("columns", {}), **found.fields},
        "unused": sorted(found.unused),
        "samples": counts,
    }


def explained(values: Mapping[str, Any]) -> list[str]:
    """The lines of ``values`` as YAML, each setting with its meaning beside it."""
    lines = []
    path: list[tuple[int, str]] = []
    for line in parsing.dump_yaml(dict(values)).splitlines():
        indent, key = len(line) - len(line.lstrip()), line.strip().partition(":")[0]
        path = [*[(at, name) for at, name in path if at < indent], (indent, key)]
        top = path[0][1]
        kind = f"{top}[{values[top]['name']}]" if top in ("adapter", "task", "data") else top
        meaning = settings.meaning_of(".".join([kind, *(name for _, name in path[1:])]))
        lines.append(f"{line:34s} # {meaning}" if meaning and not line.endswith(":") else line)
    return lines


def values_of(
    found: Guess, table: Path, out: Path, llm: str | None, encoders: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration, and its section ``data``."""
    names = modality_names(found.inputs)
    if strange := sorted(encoders.keys() - names.values()):
        raise ConfigError(f"--encoder {strange[0]}=…: the table's inputs are {', '.join(names.values())}")
    ours = {name: encoder(name, found.inputs[column], encoders.get(name), found, column) for column, name in names.items()}
    renamed = {name: column for column, name in names.items() if column != name}
    columns = renamed | {field: name for field, name in found.fields.items() if field != name}
    data: dict[str, Any] = {"name": found.format or FORMATS[found.task], "root": relative(found.root)}
    if table.is_dir():
        parted = (table / "train").is_dir()
        own = {split: split for split in SPLITS if (table / split).is_dir()} if parted else {"train": "."}
        drawn = {} if "val" in own else {f"{split}_share": 0.1 for split in SPLITS[1:] if split not in own}
        data |= {"name": "folders", "splits": own, **drawn}
    elif found.task == "segment":
        data |= splits_of(table, found.root) | found.fields
        ours["image"] = seeing(encoders.get("image"))
    else:
        data |= splits_of(table, found.root) | ({} if found.format else {"columns": columns})
    if found.lacking and found.task not in ("caption", "retrieve"):
        data["may_lack"] = [names[column] for column in found.lacking]
    task: dict[str, Any] = {"name": found.task, **(SEGMENT if found.task == "segment" else {})}
    if found.task in ("classify", "regress"):
        task["readout"] = ["last", *ours]
    if found.format == "conversations" and not llm:
        task["chat"] = True  # the models taken by default are instruct models, with a chat template
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in out.stem if c.isascii()).lstrip("._-")
    values = {"name": kept[:64] or "run", "model": {"llm": llm or available(LLM), "encoders": ours}}
    features = {"normalize": "standardize", "norm": 8.0}
    return values | {"adapter": {"name": "mit", "rank": 64}, "features": features, "task": task, "data": data}, data


def modality_names(inputs: Mapping[str, str]) -> dict[str, str]:
    """A name for each column of files: its kind, where that is the only one, else the column's own."""
    kinds = list(inputs.values())
    usable = {column: "".join(c if c.isalnum() else "_" for c in column.lower()) for column in inputs}
    return {
        column: kind if kinds.count(kind) == 1 and kind not in ("text", "features") else usable[column]
        for column, kind in inputs.items()
    }


def encoder(name: str, kind: str, given: str | None, found: Guess, column: str) -> Any:
    if kind == "features":
        return {"takes": "features", "width": int(read_array(found.root, found.first[column]).values.shape[-1])}
    own: dict[str, Any] = {"name": given or available(ENCODERS[kind])}
    if name != kind:
        own["takes"] = kind
    if kind in ("image", "video") and not given:
        own["size"] = SIZE
    return own if len(own) > 1 else own["name"]


def seeing(given: str | None) -> dict[str, Any]:
    """An image encoder three of whose layers the decoder sees: the top and what lies a third and two thirds below it."""
    levels = LEVELS
    if given:
        config = loading.read_config(resolve_model(given), "image encoder")
        depth = int(getattr(config, "vision_config", config).num_hidden_layers)
        levels = sorted({depth, max(1, 2 * depth // 3), max(1, depth // 3)}, reverse=True)
    name = given or available(ENCODERS["image"])
    return {"name": name, "layer": levels[0], "pool": "cls+mean", "levels": levels}


def available(names: tuple[str, str]) -> str:
    """The prepared model where it can be had, else the Hugging Face id."""
    return names[0] if names[0] in prepared.recipes("models") else names[1]


def splits_of(table: Path, root: Path) -> dict[str, Any]:
    """The splits' files: those beside a train.csv, else shares of the one there is."""
    there = {split: table.with_name(split + table.suffix) for split in SPLITS}
    own = {split: path for split, path in there.items() if path.is_file()} if table.stem == "train" else {"train": table}
    shares = {f"{split}_share": 0.1 for split in SPLITS[1:] if split not in own}
    if "val" in own:
        shares = {}
    return {"splits": {split: seen_from(root, path) for split, path in own.items()}, **shares}


def seen_from(root: Path, path: Path) -> str:
    """The file's path from the folder ``root``, which may be a link."""
    beside = os.path.relpath(path, root)
    return beside if (root / beside).is_file() else str(path.resolve())


def relative(folder: Path) -> str:
    """The folder as seen from here, where it is below."""
    path = os.path.relpath(folder)
    return str(folder.resolve()) if path.startswith("..") else path


def training(samples: int) -> dict[str, Any]:
    """More epochs of few samples, so that there are some hundred steps."""
    batch = max(1, min(BATCH, samples // 4))
    epochs = min(MOST, max(FEWEST, STEPS * batch // max(1, samples)))
    return {"epochs": epochs, "batch": batch, "lr": 2e-3, "schedule": {"name": "cosine", "warmup": 0.1}}
