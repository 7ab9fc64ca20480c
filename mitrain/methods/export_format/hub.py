"""Exports that are named by their repository on the Hugging Face Hub, USER/NAME or USER/NAME@REVISION."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from mitrain.core.errors import CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILES = ["*.json", "*.safetensors", "README.md"]
FAILURES = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
"""What the Hub's client raises: for refusals, names that are none, missing tokens, no connection, torn uploads."""
TIMEOUT = 10.0  # seconds


def api() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def local(folder: str | Path) -> Path:
    """``folder``; where nothing is there and it reads as a repository's name, that repository in the Hub's cache.

    Without a connection, what an earlier one brought. Raises CheckpointError, in one line, where the Hub does not give it.
    """
    name, _, revision = str(folder).partition("@")
    if os.path.lexists(folder) or not HUB_NAME.fullmatch(name) or os.path.lexists(Path(name).parent):
        return Path(folder)
    try:
        alone = not answers(name, revision or None)
        found = api().snapshot_download(name, revision=revision or None, allow_patterns=FILES, local_files_only=alone)
        return Path(found)
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{str(folder)!r} is no folder here, the Hub cannot be reached, and its cache has no repository of this name:"
            " give a run's or an export's folder, or ask again with a connection"
        ) from None
    except FAILURES as error:
        raise CheckpointError(
            f"{str(folder)!r} is no folder here, and the Hub does not give a repository of this name ({first(error)}):"
            " give a run's or an export's folder, or a name that you may read (hf auth login)"
        ) from None


def answers(name: str, revision: str | None) -> bool:
    """Whether the Hub can be asked, found out at once: snapshot_download itself tries for a minute without a connection.

    Raises the client's error where the Hub refuses.
    """
    try:
        api().model_info(name, revision=revision, timeout=TIMEOUT)
    except (HfHubHTTPError, ValueError):
        raise
    except FAILURES:
        return False
    return True


def first(error: Exception) -> str:
    """An error's first lines, without where its client was asked."""
    return " ".join(str(error).split())[:200] or type(error).__name__
