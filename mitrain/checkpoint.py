"""Checkpoints: only what is trained, in safetensors and JSON, published whole or not at all.

    RUN/checkpoints/step-00000100/
        adapter.safetensors    one file per group of named tensors (adapter, head, optimizer, …)
        state.json             counters, random states, data cursor: any JSON object
        manifest.json          format version, step, and the SHA-256 and size of every other file; written last

Tensors are keyed by name and free of rank and process: nothing says how many processes wrote them. A checkpoint is
written to a hidden folder beside its final name, read back against its checksums, flushed and then renamed, so an
interruption at any moment leaves the old ones untouched. The newest *complete* one wins. Nothing is ever unpickled.
"""

import base64
import hashlib
import importlib.metadata
import json
import logging
import os
import random
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from mitrain.errors import CheckpointError
from mitrain.files import atomic_folder, file_lock

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MANIFEST_LIMIT = 1 << 20
FOLDER_NAME = re.compile(r"step-(\d{8,12})(?:\.(\d{1,6}))?", re.ASCII)
GROUP_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}", re.ASCII)
FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}\.safetensors|state\.json", re.ASCII)
OTHER = "take another checkpoint"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``tensors[group][name]`` on the CPU, and the JSON state that was saved with them."""

    path: Path
    step: int
    best: bool
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The parsed manifest.json. ``sequence`` counts the checkpoints of a run in the order of their publication."""

    step: int
    sequence: int
    best: bool
    files: dict[str, tuple[str, int]]


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
    was resumed at an earlier step): a published folder is never touched. A full or failing disk raises
    CheckpointError and leaves everything as it was.
    """
    folder = Path(run_dir) / "checkpoints"
    try:
        with file_lock(folder / ".lock"):
            clear_leftovers(folder)
            known = survey(folder)
            sequence = 1 + max((manifest.sequence for _, manifest in known), default=0)
            target = free_name(folder, step)
            with atomic_folder(target) as work:
                write(work, step, sequence, best, tensors, state)
                read_back(work)
            rotate([*known, (target, read_manifest(target))], keep)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {folder} ({error.strerror or error}): "
            "make room there or give another run folder; earlier checkpoints are untouched"
        ) from None
    return target


def write(
    work: Path,
    step: int,
    sequence: int,
    best: bool,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> None:
    files = {}
    for group, named in tensors.items():
        if not GROUP_NAME.fullmatch(group):
            raise ValueError(f"{group!r} cannot name a group of tensors: use small letters, digits and underscores")
        content = safetensors.save({name: portable(tensor) for name, tensor in named.items()}, {"format": "pt"})
        files[f"{group}.safetensors"] = put(work / f"{group}.safetensors", content)
    files[STATE] = put(work / STATE, json.dumps(state, sort_keys=True).encode())
    manifest = {
        "format": FORMAT,
        "mitrain": mitrain_version(),
        "step": step,
        "sequence": sequence,
        "best": best,
        "files": files,
    }
    put(work / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())


def read_back(work: Path) -> None:
    try:
        verify(work)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint does not read back as written, check the disk: {error}") from None


def portable(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


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


def clear_leftovers(folder: Path) -> None:
    """Remove the hidden folders of writers that were killed. The caller holds the lock, so no writer is alive."""
    for path in folder.glob(".step-*"):
        log.warning("removing %s: what a writer left that was interrupted", path)
        shutil.rmtree(path)


def rotate(known: list[tuple[Path, Manifest]], keep: int) -> None:
    """Remove the oldest of ``known``, all of them whole by size; the newest ``keep`` (at least 1) and the best stay."""
    known = sorted(known, key=lambda item: item[1].sequence)
    bests = [path for path, manifest in known if manifest.best]
    for path, _ in known[: -max(1, keep)]:
        if path not in bests[-1:]:
            hidden = path.with_name(f".{path.name}.removed")
            os.replace(path, hidden)
            shutil.rmtree(hidden)


def survey(folder: Path) -> list[tuple[Path, Manifest]]:
    """All checkpoints whose manifest reads and whose files have their sizes; each other one is named in a warning."""
    found = []
    for path in sorted(folder.glob("step-*")):
        if FOLDER_NAME.fullmatch(path.name):
            try:
                found.append((path, check_sizes(path)))
            except CheckpointError as error:
                log.warning("skipping a checkpoint that is not whole: %s", error)
    return found


def newest_complete(run_dir: str | Path, best_only: bool) -> Path | None:
    known = survey(Path(run_dir) / "checkpoints")
    for path, manifest in sorted(known, key=lambda item: item[1].sequence, reverse=True):
        if best_only and not manifest.best:
            continue
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("skipping a checkpoint that is not whole: %s", error)
        else:
            return path
    return None


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint that is complete and whose checksums agree, or None."""
    return newest_complete(run_dir, best_only=False)


def best(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint that was saved as the best so far, or None."""
    return newest_complete(run_dir, best_only=True)


def verify(path: str | Path) -> Manifest:
    """Read every byte of a checkpoint and compare it with the manifest; CheckpointError names what differs."""
    manifest = read_manifest(Path(path))
    for name in manifest.files:
        read_checked(Path(path), name, manifest)
    return manifest


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, from the same bytes whose checksums were compared."""
    path = Path(path)
    manifest = read_manifest(path)
    tensors = {}
    for name in manifest.files:
        content = read_checked(path, name, manifest)
        if name == STATE:
            state = parse_json(content, path / name)
        else:
            tensors[name.removesuffix(".safetensors")] = parse_tensors(content, path / name)
    return Checkpoint(path, manifest.step, manifest.best, tensors, state)


def check_sizes(path: Path) -> Manifest:
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link: give the folder that it points to")
    manifest = read_manifest(path)
    for name, (_, size) in manifest.files.items():
        if regular_size(path / name) != size:
            raise CheckpointError(f"{path / name} is not {size} bytes long as its manifest says: {OTHER}")
    return manifest


def read_checked(path: Path, name: str, manifest: Manifest) -> bytes:
    digest, size = manifest.files[name]
    content = read_regular(path / name, size)
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path / name} is torn or corrupted (its checksum differs from the manifest's): {OTHER}")
    return content


def regular_size(path: Path) -> int:
    """The size of a plain file; links and devices are refused, for a checkpoint never holds any."""
    try:
        info = os.lstat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({getattr(error, 'strerror', error)}): {OTHER}") from None
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a plain file: {OTHER}")
    return info.st_size


def read_regular(path: Path, limit: int) -> bytes:
    """A plain file's content, without following a link; one longer than ``limit`` bytes is refused unread."""
    if regular_size(path) > limit:
        raise CheckpointError(f"{path} is longer than the {limit} bytes expected: {OTHER}")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): {OTHER}") from None


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not JSON: {OTHER}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: {OTHER}")
    return value


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({str(error)[:100]}): {OTHER}") from None


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``, every field checked; CheckpointError if it is not one we can read."""
    if not os.path.lexists(path / MANIFEST):
        raise CheckpointError(f"{path} is not a complete checkpoint (it has no {MANIFEST}): {OTHER}")
    values = parse_json(read_regular(path / MANIFEST, MANIFEST_LIMIT), path / MANIFEST)
    version = values.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, written by mitrain {str(values.get('mitrain'))[:20]}; "
            f"this version reads up to {FORMAT}: upgrade mitrain"
        )
    step, sequence, files = (values.get(key) for key in ("step", "sequence", "files"))
    counters = all(type(value) is int and value >= 0 for value in (version, step, sequence))
    if not counters or version < 1 or type(values.get("best")) is not bool or not isinstance(files, dict):
        raise CheckpointError(f"{path / MANIFEST} is no checkpoint manifest: {OTHER}")
    if STATE not in files:
        raise CheckpointError(f"{path / MANIFEST} lists no {STATE}: {OTHER}")
    return Manifest(step, sequence, values["best"], {n: parse_entry(n, e, path) for n, e in files.items()})


def parse_entry(name: str, entry: Any, path: Path) -> tuple[str, int]:
    """(sha256, bytes) of one listed file; names are bare, so a manifest points at nothing outside its folder."""
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{path / MANIFEST} lists the file {name[:60]!r}, which no checkpoint has: {OTHER}")
    digest, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
    if not isinstance(digest, str) or type(size) is not int or size < 0:
        raise CheckpointError(f"{path / MANIFEST} gives no checksum and size for {name!r}: {OTHER}")
    return digest, size


def only_trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of ``module`` by name; CheckpointError if any parameter is frozen.

    The last line of defence against a base model's weights in an adapter's checkpoint.
    """
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            raise CheckpointError(f"{name!r} is frozen and has no place in a checkpoint: save trained modules only")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def restore(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load saved ``tensors`` into ``module``; CheckpointError lists what is not finite, and names and shapes that differ."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - own.keys()]
    wrong += [
        f"{name} has shape {list(tensors[name].shape)}, here {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    wrong += [
        f"{name} holds no plain numbers"
        for name in own.keys() & tensors.keys()
        if own[name].is_floating_point() and not is_finite(tensors[name])
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        shown = "; ".join(sorted(wrong)[:3])
        raise CheckpointError(f"the saved {what} does not fit: {shown}{more}: use the configuration it was saved with")
    module.load_state_dict(dict(tensors))


def is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.float().isfinite().all())


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (every CUDA device's too) as JSON."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": {"version": version, "words": encode(np.array(words, np.uint32)), "gauss": gauss},
        "numpy": {**numpy, "state": {"key": encode(numpy["state"]["key"]), "pos": int(numpy["state"]["pos"])}},
        "torch": encode(torch.get_rng_state().numpy()),
        "cuda": [encode(state.numpy()) for state in cuda],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Take over what ``rng_state`` gave. CUDA states beyond the devices of this machine are left out."""
    try:
        python, numpy = state["python"], dict(state["numpy"])
        numpy["state"] = {"key": decode(numpy["state"]["key"], np.uint32), "pos": numpy["state"]["pos"]}
        words = tuple(map(int, decode(python["words"], np.uint32)))
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(numpy)
        torch.set_rng_state(torch.from_numpy(decode(state["torch"], np.uint8)))
        for device, encoded in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(torch.from_numpy(decode(encoded, np.uint8)), device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the saved random state cannot be read ({str(error)[:80]}): {OTHER}") from None


def encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def decode(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype).copy()
