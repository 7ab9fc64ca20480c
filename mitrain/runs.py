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
    text = yaml.safe_dump(run_config.to_dict(), sort_keys=False, allow_unicode=True)
    write_atomic(folder / "config.yaml", f"# resolved configuration, hash {run_config.hash}\n{text}")
    return folder


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
