"""A run's folder of checkpoints: publishing one, finding the newest complete one, removing old ones."""

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from mitrain.core.errors import CheckpointError
from mitrain.core.files import atomic_folder, remedy
from mitrain.training.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    Checkpoint,
    CheckpointManifest,
    check_sizes,
    checksum,
    load,
    read_manifest,
    verify,
)
from mitrain.training.checkpoint.modules import not_finite

FOLDER_NAME = re.compile(r"step-(\d{8,12})(?:\.(\d{1,6}))?", re.ASCII)
GROUP_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}", re.ASCII)

log = logging.getLogger(__name__)


def save(
    run_dir: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 3,
    best: bool = False,
) -> Path:
    """Publish a checkpoint and then remove the good ones that are neither among the newest ``keep`` nor the best.

    ``best`` says that this is the best so far. The folder gets a suffix when one of the same step exists (a run that
    was resumed at an earlier step): a published folder is never touched. What is not finite, and a full or failing disk,
    raise CheckpointError and leave everything as it was. The caller is the only writer (`mitrain.core.ownership`).
    """
    if where := not_finite(tensors):
        raise CheckpointError(f"no checkpoint of step {step} is written: {where} is not finite; lower the learning rate")
    folder = Path(run_dir) / "checkpoints"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the caller owns the run, so no writer of these hidden folders is alive
        for path in folder.glob(".step-*"):
            log.warning("removing %s: what a writer left that was interrupted", path)
            shutil.rmtree(path)
        known = complete_checkpoints(folder)
        # Not the step: a run resumed at an earlier checkpoint publishes smaller steps later.
        sequence = 1 + max((manifest.sequence for _, manifest in known), default=0)
        target = free_name(folder, step)
        with atomic_folder(target) as work:
            write(work, step, sequence, best, tensors, state)
            try:
                verify(work)
            except CheckpointError as error:
                raise CheckpointError(f"the checkpoint does not read back as written, check the disk: {error}") from None
        rotate([*known, (target, read_manifest(target))], keep)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {folder} ({error.strerror or error}): "
            f"{remedy(error)} or give another run folder; earlier checkpoints are untouched"
        ) from None
    return target


def write(
    work: Path, step: int, sequence: int, best: bool, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    files = {}
    for group, named in tensors.items():
        if not GROUP_NAME.fullmatch(group):
            raise ValueError(f"{group!r} cannot name a group of tensors: use small letters, digits and underscores")
        # contiguous copies that share memory with nothing
        content = safetensors.save(
            {name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in named.items()},
            {"format": "pt"},
        )
        files[f"{group}.safetensors"] = put(work / f"{group}.safetensors", content)
    files[STATE] = put(work / STATE, json.dumps(state, allow_nan=False).encode())
    manifest = {
        "format": FORMAT,
        "mitrain": mitrain_version(),
        "step": step,
        "sequence": sequence,
        "best": best,
        "files": files,
    }
    manifest["checksum"] = checksum(manifest)
    # Last: where there is a manifest, all that it lists was written.
    put(work / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())


def put(path: Path, content: bytes) -> dict[str, Any]:
    path.write_bytes(content)
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def mitrain_version() -> str:
    try:
        return importlib.metadata.version("mitrain")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def free_name(folder: Path, step: int) -> Path:
    target, attempt = folder / f"step-{step:08d}", 0
    while os.path.lexists(target):
        attempt += 1
        target = folder / f"step-{step:08d}.{attempt}"
    return target


def rotate(known: list[tuple[Path, CheckpointManifest]], keep: int) -> None:
    """Remove the oldest of ``known``, all of them whole by size; the newest ``keep`` (at least 1) and the best stay.

    The newest was read back just now, so a good one always stays. One that turns out corrupted is named and kept.
    """
    known = sorted(known, key=lambda item: item[1].sequence)
    bests = [path for path, manifest in known if manifest.best]
    for path, _ in known[: -max(1, keep)]:
        if path not in bests[-1:] and is_whole(path):
            # Out of sight first: an interruption would leave half a folder under a published name.
            hidden = path.with_name(f".{path.name}.removed")
            os.replace(path, hidden)
            shutil.rmtree(hidden)


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint agrees with its manifest; a warning names one that does not."""
    try:
        verify(path)
    except CheckpointError as error:
        log.warning("skipping a checkpoint that is not whole: %s", error)
        return False
    return True


def complete_checkpoints(folder: Path) -> list[tuple[Path, CheckpointManifest]]:
    """All checkpoints whose manifest reads and whose files have their sizes; each other one is named in a warning."""
    complete = []
    for path in sorted(folder.glob("step-*")):
        if FOLDER_NAME.fullmatch(path.name):
            try:
                complete.append((path, check_sizes(path)))
            except CheckpointError as error:
                log.warning("skipping a checkpoint that is not whole: %s", error)
    return complete


def usable(run_dir: str | Path, best_first: bool = False) -> Iterator[Checkpoint]:
    """The checkpoints that are complete, agree with their checksums and are finite, the newest first.

    Each other one is named in a warning. ``best_first``: those that were saved as the best so far come before all others.
    """
    known = complete_checkpoints(Path(run_dir) / "checkpoints")
    order = sorted(known, key=lambda item: (best_first and item[1].best, item[1].sequence), reverse=True)
    for path, _ in order:
        try:
            yield load(path)
        except CheckpointError as error:
            log.warning("skipping a checkpoint that cannot be used: %s", error)


def latest(run_dir: str | Path) -> Path | None:
    """The newest usable checkpoint, or None."""
    return next((saved.path for saved in usable(run_dir)), None)


def best(run_dir: str | Path) -> Path | None:
    """The newest usable checkpoint that was saved as the best so far, or None."""
    return next((saved.path for saved in usable(run_dir, best_first=True) if saved.best), None)


def any_published(run_dir: str | Path) -> bool:
    """Whether a run has published a checkpoint, be it usable or not."""
    return any(FOLDER_NAME.fullmatch(path.name) for path in (Path(run_dir) / "checkpoints").glob("step-*"))
