"""manifest.json: what a checkpoint holds, and whether it still does.

``checksum`` is over everything else in the manifest, so that a flipped byte in a counter is seen too.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mitrain.core.errors import CheckpointError
from mitrain.core.safe_io import parse_json, parse_tensors, read_regular, regular_size
from mitrain.training.checkpoint.modules import not_finite

FORMAT = 3
KEYS = {"format", "mitrain", "step", "sequence", "best", "files", "checksum"}
MANIFEST = "manifest.json"
STATE = "state.json"
MANIFEST_LIMIT = 1 << 20
FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}\.safetensors|state\.json", re.ASCII)
OTHER = "take another checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``tensors[group][name]`` on the CPU, and the JSON state that was saved with them."""

    path: Path
    step: int
    best: bool
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class CheckpointManifest:
    """The parsed manifest.json. ``sequence`` counts the checkpoints of a run in the order of their publication."""

    step: int
    sequence: int
    best: bool
    files: dict[str, tuple[str, int]]


def checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest without its own checksum, as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(path: str | Path) -> CheckpointManifest:
    """Read every byte of a checkpoint and compare it with the manifest; CheckpointError names what differs."""
    manifest = read_manifest(Path(path))
    for name in manifest.files:
        read_checked(Path(path), name, manifest)
    return manifest


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, from the same bytes whose checksums were compared; CheckpointError where it is not finite."""
    path = Path(path)
    manifest = read_manifest(path)
    tensors = {}
    for name in manifest.files:
        content = read_checked(path, name, manifest)
        if name == STATE:
            state = parse_json(content, path / name, OTHER, finite=True)
        else:
            tensors[name.removesuffix(".safetensors")] = parse_tensors(content, path / name, OTHER)
    if where := not_finite(tensors):
        raise CheckpointError(f"{path} holds what is not finite, {where}: {OTHER}")
    return Checkpoint(path, manifest.step, manifest.best, tensors, state)


def check_sizes(path: Path) -> CheckpointManifest:
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link: give the folder that it points to")
    manifest = read_manifest(path)
    for name, (_, size) in manifest.files.items():
        if regular_size(path / name, OTHER) != size:
            raise CheckpointError(f"{path / name} is not {size} bytes long as its manifest says: {OTHER}")
    return manifest


def read_checked(path: Path, name: str, manifest: CheckpointManifest) -> bytes:
    digest, size = manifest.files[name]
    content = read_regular(path / name, size, OTHER)
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path / name} is torn or corrupted (its checksum differs from the manifest's): {OTHER}")
    return content


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of the checkpoint at ``path``, every field checked; CheckpointError if it is not one we can read."""
    if not os.path.lexists(path / MANIFEST):
        raise CheckpointError(f"{path} is not a complete checkpoint (it has no {MANIFEST}): {OTHER}")
    values = parse_json(read_regular(path / MANIFEST, MANIFEST_LIMIT, OTHER), path / MANIFEST, OTHER)
    version = values.get("format")
    if type(version) is int and 0 < version != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, written by mitrain {str(values.get('mitrain'))[:20]}; "
            f"this version reads format {FORMAT}: {'upgrade mitrain' if version > FORMAT else OTHER}"
        )
    step, sequence, files = (values.get(key) for key in ("step", "sequence", "files"))
    counters = all(type(value) is int and value >= 0 for value in (version, step, sequence))
    if not counters or version < 1 or type(values.get("best")) is not bool or not isinstance(files, dict):
        raise CheckpointError(f"{path / MANIFEST} is no checkpoint manifest: {OTHER}")
    if values.keys() != KEYS:
        raise CheckpointError(f"{path / MANIFEST} has not the keys of format {FORMAT}: {OTHER}")
    if values["checksum"] != checksum(values):
        raise CheckpointError(f"{path / MANIFEST} is corrupted (its own checksum differs): {OTHER}")
    if STATE not in files:
        raise CheckpointError(f"{path / MANIFEST} lists no {STATE}: {OTHER}")
    return CheckpointManifest(step, sequence, values["best"], {n: parse_entry(n, e, path) for n, e in files.items()})


def parse_entry(name: str, entry: Any, path: Path) -> tuple[str, int]:
    """(sha256, bytes) of one listed file; names are bare, so a manifest points at nothing outside its folder."""
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{path / MANIFEST} lists the file {name[:60]!r}, which no checkpoint has: {OTHER}")
    digest, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
    if not isinstance(digest, str) or type(size) is not int or size < 0:
        raise CheckpointError(f"{path / MANIFEST} gives no checksum and size for {name!r}: {OTHER}")
    return digest, size
