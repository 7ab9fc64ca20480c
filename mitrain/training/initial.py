"""``train.init_from``: a run that starts from the adapter of another one, in place of fresh weights."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mitrain.core.errors import ConfigError
from mitrain.core.safe_io import misfits
from mitrain.methods import export_format
from mitrain.methods.export_format.folder import GROUPS
from mitrain.tasks.momentum import MomentumQueue
from mitrain.training import checkpoint, runs
from mitrain.training.build import Model
from mitrain.training.checkpoint.manifest import MANIFEST
from mitrain.training.fingerprint import differences, flat, listed
from mitrain.training.resume import completed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What was trained before: ``tensors[group][name]``, the configuration they were trained with (of an adapter alone its
    section ``adapter``), and the digests of the ``frozen`` models, if they are known."""

    path: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    config: Mapping[str, Any]
    frozen: Mapping[str, str]


def read(place: str) -> Start:
    """The best checkpoint of a run folder, a checkpoint's own folder, or an export."""
    path = Path(place).expanduser()
    if export_format.is_published(path):
        published = export_format.read(path)
        contents = published.contents
        config = {**(contents.run.config if contents.run else {}), "adapter": contents.adapter}
        return Start(path, published.tensors, config, contents.frozen or {})
    if not any((path / name).exists() for name in ("config.yaml", MANIFEST)):
        raise ConfigError(
            f"train.init_from={place!r} is no run folder, none of its checkpoints and no export: give one of these"
        )
    saved = checkpoint.load(path) if (path / MANIFEST).exists() else runs.newest(path, "best")
    config = saved.state.get("config")
    tensors = {group: saved.tensors.get(group, {}) for group in GROUPS}
    return Start(saved.path, tensors, config if isinstance(config, dict) else {}, runs.frozen_of(saved))


def load_adapter(start: Start, model: Model, allow_changes: bool) -> bool:
    """Put the adapter into ``model``; whether the feature statistics that it was trained with are there, too.

    CheckpointError where it does not fit. ModelError where it was trained on other frozen models, unless ``allow_changes``.
    """
    runs.check_frozen(start.frozen, lambda: model.base, start.path, allow_changes)
    own = model.config.to_dict()
    there, here = ({f"{part}.": values.get(part) for part in ("adapter", "features")} for values in (start.config, own))
    known = {part: value for part, value in there.items() if isinstance(value, dict)}
    if changed := differences(flat_parts(known), flat_parts({part: here[part] for part in known})):
        log.warning("the adapter of %s was trained with other settings: %s", start.path, listed(changed))
    checkpoint.restore(model.adapter, start.tensors["adapter"], f"adapter in {start.path}")
    if not start.tensors["features"]:
        return False
    checkpoint.restore(model.norm, start.tensors["features"], f"features in {start.path}")
    return True


def flat_parts(parts: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for part, values in parts.items() for name, value in flat(values, part).items()}


def load_head(start: Start, model: Model) -> None:
    """Put the task's head into ``model`` where it is one of the same task, and say what the run starts from."""
    task = model.task
    kept = {name: tensor for name, tensor in task.state_dict().items() if name.startswith(task.of_samples or ("\0",))}
    saved = {n: t for n, t in start.tensors["head"].items() if n not in kept}
    why = other_head(start, model, saved, kept)
    if saved and not why:
        checkpoint.restore(task, saved | kept, f"head in {start.path}")
    for module in task.modules():
        if isinstance(module, MomentumQueue):
            module.follow()
    head = "" if not task.state_dict() else f"; the task head starts anew: {why}" if why else " and the task head"
    log.warning("starting from the adapter%s of %s", head, start.path)


def other_head(start: Start, model: Model, saved: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> str:
    """Why the saved head is not this task's, or nothing."""
    own, there = model.config.task, completed(start.config).get("task")
    if not isinstance(there, dict):
        return "it is not part of it"
    sections = [{f"task.{key}": v for key, v in flat(section).items() if key not in ("queue", "metric")} for section in
                (there, {"name": own.section_name, **own.to_dict()})]  # fmt: skip
    data = start.config.get("data")
    classes = data.get("classes") if isinstance(data, dict) else None
    wrong = differences(*sections) or misfits(dict(model.task.state_dict()), {**saved, **kept})
    own_classes = getattr(model.task, "classes", None)
    if own_classes is not None and list(own_classes) != list(classes or ()):
        wrong = ["its classes are other ones", *wrong]
    return listed(wrong, 2)
