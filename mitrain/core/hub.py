"""Data sets of Hugging Face's `datasets` as prepared ones: ``source: hf:ID``, from its local cache, or ``hf:FOLDER``.

`datasets` (the extra [datasets]) runs in a process of its own, which asks no hub, and saves each split into a folder of its
name; from then on they are read as any folder of ``save_to_disk`` (`mitrain.data.formats.manifest`).
"""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mitrain.core import prepared
from mitrain.core.errors import PrepareError
from mitrain.core.prepared import Recipe

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
PREFIX = "hf:"


class HubRecipe(Recipe):
    """The data set whose id, ID:CONFIGURATION, or folder is its name behind "hf:"."""

    def builder(self) -> Callable[[Sequence[Path], Path, int], None]:
        return lambda archives, target, seed: save(self.notes, target)


def ensure(source: str) -> Path:
    """The folder with the splits of "hf:ID", prepared now if it is not there yet. Raises PrepareError."""
    name = source.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    name = str(folder.absolute()) if folder.exists() else name
    short = re.sub(r"[^\w.-]+", "--", name).strip("-.")[-60:]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]  # another is prepared anew
    known = f"hf-{short}-{hashlib.sha256(repr((name, state)).encode()).hexdigest()[:12]}"
    recipe = HubRecipe(known, "a Hugging Face data set", "its own", f"the data set {name}", 0, "", notes=name)
    return prepared.ensure(recipe, prepared.folder_of("data", recipe, 0), None, 0, repair=True)


def save(name: str, target: Path) -> None:
    """Each split of the data set as a folder in ``target``. PrepareError in one line."""
    command = [sys.executable, "-m", "mitrain.core.hub", name, str(target)]
    done = subprocess.run(command, env={**os.environ, **OFFLINE}, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise PrepareError(
            f"the Hugging Face data set {name!r} cannot be read ({said[-1][:300] if said else 'its process was ended'}):"
            " bring it into the local cache with datasets.load_dataset once, or give a folder that load_dataset takes; it"
            " needs pip install 'mitrain[datasets]'"
        )


def main(name: str, target: str) -> None:
    import datasets

    name, _, configuration = (name, "", "") if Path(name).exists() else name.partition(":")
    found = datasets.load_dataset(name, configuration or None)
    found.save_to_disk(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
