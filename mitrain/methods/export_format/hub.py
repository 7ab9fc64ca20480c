"""Exports that are named by their repository on the Hugging Face Hub, USER/NAME or USER/NAME@REVISION."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from mitrain.core.errors import CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILES = ["*.json", "*.safetensors", "README.md"]
FAILURES = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
"""What the Hub's client raises: for refusals, names that are none, missing tokens, no connection, torn uploads."""


def api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def local(folder: str | Path) -> Path:
    """``folder``; where nothing is there and it reads as a repository's name, that repository in the Hub's cache.

    Raises CheckpointError, in one line, where the Hub does not give it.
    """
    name, _, revision = str(folder).partition("@")
    if os.path.lexists(folder) or not HUB_NAME.fullmatch(name) or os.path.lexists(Path(name).parent):
        return Path(folder)
    try:
        return Path(api().snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except FAILURES as error:
        raise CheckpointError(
            f"{str(folder)!r} is no folder here, and the Hub does not give a repository of this name ({first(error)}):"
            " give a run's or an export's folder, or a name that you may read (hf auth login)"
        ) from None


def first(error: Exception) -> str:
    """An error's first lines, without where its client was asked."""
    return " ".join(str(error).split())[:200] or type(error).__name__
