"""Small checkpoints for tests, and ways to damage or forge them."""

import hashlib
import json
import os
from pathlib import Path

import torch

from mitrain.training import checkpoint
from mitrain.training.checkpoint.manifest import checksum


def tensors(step: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = {"gate": torch.randn(3, generator=generator), "k.weight": torch.randn(4, 2, generator=generator)}
    return {"adapter": weights, "optimizer": {"exp_avg.gate": torch.randn(3, generator=generator)}}


def save(run: Path, step: int, **options) -> Path:
    return checkpoint.save(run, step, tensors(step), {"cursor": step}, **options)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (run / "checkpoints").glob("step-*"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path, **changes) -> None:
    """Change the manifest (``None`` removes a key) and make its own checksum agree: what a forger would do."""
    file = path / "manifest.json"
    values = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if value is not None}
    file.write_text(json.dumps({**values, "checksum": checksum(values)} if "checksum" in values else values))


def signed(path: Path, name: str, content: bytes) -> None:
    """Put ``content`` in place with a manifest that vouches for it: what a forger would do."""
    (path / name).write_bytes(content)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    listed[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(path, files=listed)


def missing(path: Path) -> None:
    path.unlink()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x" * (checkpoint.MANIFEST_LIMIT + 1))


def linked(path: Path) -> None:
    path.rename(path.with_name("original"))
    path.symlink_to("original")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def looped(path: Path) -> None:
    """A link that leads to itself."""
    path.unlink()
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """Opening it for reading would wait for ever."""
    path.unlink()
    os.mkfifo(path)
