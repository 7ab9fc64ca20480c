"""Whether a run may go on from a checkpoint: it is the same run, or each difference was named and allowed."""

import logging
from collections.abc import Mapping
from typing import Any

from mitrain.core import dist, glance
from mitrain.core.errors import ConfigError
from mitrain.training import moved, schema
from mitrain.training.checkpoint import Checkpoint
from mitrain.training.fingerprint import differences, flat, listed

DECIDING = ("config", "data", "base")
"""The parts that decide what a run computes. Other code is named, and goes on: a mended mitrain may finish a run."""

log = logging.getLogger(__name__)


def recorded(own: Mapping[str, str]) -> dict[str, str]:
    """What a checkpoint keeps of a fingerprint: all but the configuration, which it has in full."""
    return {name: value for name, value in own.items() if not name.startswith("config.")}


def fingerprint_of(saved: Checkpoint) -> dict[str, str]:
    """The fingerprint of the run that wrote ``saved``; a part that it does not say differs from every run's."""
    parts, config = (saved.state.get(key) for key in ("fingerprint", "config"))
    digests = {str(name): str(value) for name, value in parts.items()} if isinstance(parts, dict) else {}
    config = moved.found(completed(config), saved.state.get("folder"), saved.path.parent.parent)
    return digests | {f"config.{key}": value for key, value in flat(config).items()}


def completed(config: Any) -> dict[str, Any]:
    """A saved configuration with the defaults of keys that have come since; as it is where it is not understood."""
    if not isinstance(config, dict):
        return {}
    try:
        return schema.from_dict(config).to_dict()
    except ConfigError:
        return config


def compare(saved: Checkpoint, own: Mapping[str, str], allow_changes: bool) -> None:
    """Name all that differs between the run that wrote ``saved`` and this one; all ranks do it together.

    ConfigError where that changes what is computed, unless ``allow_changes``.
    """
    there = fingerprint_of(saved)
    overrides = [f"config.{key}" for key in glance.RESUME_OVERRIDES]
    changed = dist.first_not_none(differences(there, own, [*overrides, "code"]) or None) or []
    code = differences(there, own, DECIDING)
    if changed and not allow_changes:
        raise ConfigError(
            f"this is not the run that wrote {saved.path}: {readable(changed)}; undo that, start a new run, or go on all"
            " the same with --allow-changes"
        )
    if changed:
        log.warning("going on from %s with changes: %s", saved.path, readable(changed))
    if code:
        log.warning("%s was written by other code: %s", saved.path, readable(code))


def readable(phrases: list[str]) -> str:
    return listed([phrase.removeprefix("config.") for phrase in phrases])
