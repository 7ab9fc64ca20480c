"""Folders of this machine in what is published: as little of them as opening it needs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def settings_from(values: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """A run's configuration as it is published in ``folder``: without telemetry, ranks and device, which are the loading
    machine's to say, and with as little of this machine's folders as predictions need."""
    kept = {section: value for section, value in values.items() if section not in ("telemetry", "wandb", "zero")}
    model = values["model"]
    encoders = {name: {**part, "name": without_home(part["name"])} for name, part in model["encoders"].items()}
    kept["model"] = {**model, "llm": without_home(model["llm"]), "encoders": encoders, "device": "auto"}
    start = values["train"].get("init_from")
    train = {**values["train"], "init_from": start and os.path.basename(start)}
    return {**kept, "train": train, "data": data_from(values["data"], folder)}


def without_home(name: str) -> str:
    """A model's name; of a folder in the home of whoever publishes it, with ``~`` for that home."""
    home = Path(os.path.expanduser("~"))  # itself ~ where there is none, and then nothing lies below it
    inside = home != Path(home.root) and Path(name).is_relative_to(home)
    return str("~" / Path(name).relative_to(home)) if inside else name


def data_from(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """A section ``data``, its paths without what leads to them: the root seen from ``folder``, others from the root."""
    if values["root"] is None:
        return dict(values)
    root = os.path.expanduser(values["root"])
    paths = {key: seen_from(root, value) if key in ("file", "images") else value for key, value in values.items()}
    if "splits" in values:
        paths["splits"] = {split: seen_from(root, name) for split, name in values["splits"].items()}
    return {**paths, "root": seen_from(folder, os.path.abspath(root))}


def seen_from(folder: str | Path, name: str | None) -> str | None:
    """An absolute path relative to ``folder``, or its last part alone where they have no folder in common."""
    if name is None or not os.path.isabs(name):
        return name
    here, there = os.path.realpath(folder), os.path.realpath(name)
    return os.path.basename(name) if os.path.commonpath([here, there]) == os.sep else os.path.relpath(there, here)


def data_seen(root: str | None, folder: Path) -> str | None:
    """The root of `data_from` as a path again; a root that is not there as it is."""
    return str(folder / root) if root is not None and os.path.exists(folder / root) else root
