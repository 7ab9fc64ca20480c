"""Presets: named values of a method's settings, as its paper or its release has them."""

from collections.abc import Mapping
from typing import Any


def filled(values: Any, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """``values`` on top of the preset that they name ("default" if none); what is no mapping stays as it is."""
    preset = values.get("preset", "default") if isinstance(values, dict) else None
    return {**presets.get(preset, {}), **values} if isinstance(preset, str) else values
