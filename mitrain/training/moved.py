"""A run that was moved together with its data or models finds them again.

A run's configuration names them by absolute paths, in config.yaml and in each checkpoint, beside the folder that the run had
then. A path that is no longer there is looked for where it lies seen from the run's folder now.
"""

import json
import os
from pathlib import Path
from typing import Any

MARK = "# written in "


def told(folder: Path) -> str:
    """The line of config.yaml that says where it was written."""
    return f"{MARK}{json.dumps(str(folder.absolute()))}\n"


def written_in(text: str) -> str | None:
    """What `told` says in ``text``, a config.yaml; None where nothing does."""
    line = next((line for line in text.splitlines()[:3] if line.startswith(MARK)), None)
    try:
        place = json.loads(line.removeprefix(MARK)) if line else None
    except ValueError:
        return None
    return place if isinstance(place, str) else None


def found(values: Any, then: Any, folder: Path) -> Any:
    """``values``, plain ones, with the paths in them as they are from ``folder``, which was ``then`` when they were written.

    A path that is there stays; so does one that is in neither place, for whoever needs it to name.
    """
    if not isinstance(then, str) or then == str(folder.absolute()):
        return values
    if isinstance(values, dict):
        return {key: found(value, then, folder) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [found(value, then, folder) for value in values]
    if not isinstance(values, str) or not os.path.isabs(values) or os.path.exists(values):
        return values
    now = os.path.normpath(folder.absolute() / os.path.relpath(values, then))
    return now if os.path.exists(now) else values
