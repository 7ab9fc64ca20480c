"""A run's folder: what is in it, how it is made, and how its model is opened again.

runs/NAME-TIME/
    config.yaml          the resolved configuration with its hash
    metrics.jsonl        one JSON object per logged step
    checkpoints/         see `mitrain.checkpoint`
    summary.json         written when the run has finished
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mitrain import checkpoint, config, schema
from mitrain.checkpoint import Checkpoint
from mitrain.errors import CheckpointError, ConfigError
from mitrain.files import write_atomic
from mitrain.model import Model, build
from mitrain.schema import RunConfig


def create(run_config: RunConfig, parent: str | Path) -> Path:
    """A new run folder under ``parent`` with the resolved configuration in it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder, attempt = Path(parent) / f"{run_config.name}-{stamp}", 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            attempt += 1
            folder = Path(parent) / f"{run_config.name}-{stamp}-{attempt}"
        except OSError as error:
            raise ConfigError(
                f"cannot make the run folder {folder} ({error.strerror}): give another with --runs"
            ) from None
    write_config(run_config, folder)
    return folder


def create_or_find(run_config: RunConfig, folder: str | Path) -> Path:
    """``folder`` as the run folder of this configuration: made, or the one that an earlier start of the run left.

    ConfigError where it holds a run of another configuration, or anything else.
    """
    folder = Path(folder)
    if (folder / "config.yaml").exists():
        differing = difference(read_config(folder).to_dict(), run_config.to_dict())
        if differing:
            raise ConfigError(
                f"{folder} is a run of another configuration ({differing}): give another folder with --run"
            )
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {folder} ({error.strerror}): give another with --run") from None
    if strange:
        raise ConfigError(f"{folder} is no run folder and holds {strange[0]!r}: give another with --run")
    write_config(run_config, folder)
    return folder


def write_config(run_config: RunConfig, folder: Path) -> None:
    text = yaml.safe_dump(run_config.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomic(folder / "config.yaml", f"# resolved configuration, hash {run_config.hash}\n{text}")


def difference(saved: Any, own: Any, key: str = "") -> str:
    """The first place where two configurations differ, as 'train.steps=5 there, 6 here', or ""."""
    if saved == own:
        return ""
    if isinstance(saved, dict) and isinstance(own, dict):
        keys = sorted(saved.keys() | own.keys())
        return next(found for k in keys if (found := difference(saved.get(k), own.get(k), f"{key}.{k}".lstrip("."))))
    return f"{key}={str(saved)[:60]} there, {str(own)[:60]} here"


def read_config(folder: str | Path) -> RunConfig:
    """The resolved configuration of a run folder."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{str(folder)!r} is no run folder (it has no config.yaml): give one that mitrain train made"
        )
    return schema.from_dict(config.read_file(path))


@dataclass
class Run:
    """An opened run: its configuration, its model with the trained tensors in place, and where they came from."""

    folder: Path
    config: RunConfig
    model: Model
    saved: Checkpoint


def open_run(folder: str | Path, which: str = "best") -> Run:
    """Rebuild a run's model and load its ``best`` or ``latest`` checkpoint."""
    folder = Path(folder)
    run_config = read_config(folder)
    found = checkpoint.best(folder) if which == "best" else None
    found = found or checkpoint.latest(folder)
    if found is None:
        raise CheckpointError(
            f"{str(folder)!r} has no complete checkpoint yet: train it first (mitrain train --resume {folder})"
        )
    saved = checkpoint.load(found)
    model = build(run_config)
    restore(model, saved)
    return Run(folder, run_config, model, saved)


def restore(model: Model, saved: Checkpoint) -> None:
    """Put a checkpoint's trained tensors into ``model``."""
    for name, module in model.trainable.items():
        checkpoint.restore(module, saved.tensors.get(name, {}), f"{name} in {saved.path}")
    model.task.eval()
