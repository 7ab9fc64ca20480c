"""Writing and reading the folder of a published adapter."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn
from transformers import PretrainedConfig

from mitrain.core import config
from mitrain.core.config import Section
from mitrain.core.errors import CheckpointError, ConfigError
from mitrain.core.files import atomic_folder, remedy
from mitrain.core.safe_io import first_of, is_finite, parse_json, parse_tensors, read_regular, regular_size, unlike
from mitrain.core.version import __version__
from mitrain.methods.export_format.contents import Contents, FileSum, Parameters
from mitrain.models import loading
from mitrain.models.shapes import base_shape

FORMAT = 3
CONFIG, WEIGHTS, CARD = "mitrain.json", "mitrain.safetensors", "README.md"
PEFT_CONFIG, PEFT_WEIGHTS = PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
PEFT_FOLDERS = {"text": "llm/", "encoder": "encoder/"}
"""Where they lie, by backbone; those of the language model alone at the top: PEFT would load its half without a word."""
CONFIG_LIMIT = 1 << 24
GROUPS = ("adapter", "head", "features")
EDITABLE = ("checksum", "base_model_name_or_path")
MEND = "export it again or take another copy"

Tensors = Mapping[str, Mapping[str, Tensor]]
Shapes = Mapping[str, tuple[int, ...]]
PeftFiles = Mapping[str, tuple[dict[str, Any], dict[str, Tensor]]]
"""What PEFT's two files hold, by their folder: its configuration, and its tensors by PEFT's names."""


@dataclass(frozen=True)
class Published:
    """A folder that was read: its configuration, and ``tensors[group][name]`` on the CPU."""

    path: Path
    contents: Contents
    tensors: dict[str, dict[str, Tensor]]


def is_published(folder: str | Path) -> bool:
    return os.path.lexists(Path(folder) / CONFIG)


def check_target(folder: str | Path) -> Path:
    """``folder``, if nothing is there that writing would replace."""
    folder = Path(folder)
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{str(folder)!r} exists and is not an empty folder: give a new one, nothing is replaced")
    return folder


def publish(
    folder: str | Path, values: Mapping[str, Any], tensors: Tensors, card: Callable[[Contents], str], peft: PeftFiles
) -> Path:
    """Write ``tensors`` (by group) and the fields ``values`` of `Contents`, all but what follows from the tensors.

    ``peft``: what PEFT's own files hold, where it can load the adapter. The folder appears whole, after it has been read
    back, or not at all.
    """
    folder = check_target(folder)
    weights, beside = safetensors.save(flat(tensors), {"format": "pt"}), peft_contents(peft)
    fields = {**values, "format": FORMAT, "mitrain_version": __version__, "tensors": summed(weights), "checksum": ""}
    fields["peft"] = {name: summed(content) for name, content in beside.items()} or None
    contents = parse_contents(fields, folder / CONFIG)
    contents = contents.model_copy(update={"checksum": checksum(contents.to_dict())})
    text = json.dumps(contents.to_dict(), indent=2, allow_nan=False)
    try:
        with atomic_folder(folder) as work:
            for name, content in beside.items():
                (work / name).parent.mkdir(exist_ok=True)
                (work / name).write_bytes(content)
            (work / WEIGHTS).write_bytes(weights)
            (work / CARD).write_text(card(contents), encoding="utf-8")
            (work / CONFIG).write_text(text)
            read(work)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(folder)!r} ({error.strerror or error}): {remedy(error)} or give another folder"
        ) from None
    return folder


def peft_contents(peft: PeftFiles) -> dict[str, bytes]:
    """The content of PEFT's files, by their names."""
    contents = {}
    for folder, (settings, tensors) in peft.items():
        contents[folder + PEFT_CONFIG] = json.dumps(settings, indent=2, sort_keys=True).encode()
        contents[folder + PEFT_WEIGHTS] = safetensors.save(flat_group(tensors), {"format": "pt"})
    return contents


def summed(content: bytes) -> dict[str, Any]:
    return FileSum(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)).to_dict()


def count(trained: Iterable[nn.Module], base: nn.Module, others: Iterable[nn.Module] = ()) -> Parameters:
    """Parameters of the ``trained`` modules, and of the model that an adapter among them may be attached to, without
    ``others`` on it."""
    modules = list(trained)
    added = {id(p) for module in (*modules, *others) for p in module.parameters()}
    own = {id(p): p.numel() for p in base.parameters() if id(p) not in added}
    return Parameters(trainable=sum(map(loading.count_parameters, modules)), frozen=sum(own.values()))


def peft_files(
    peft: Mapping[str, tuple[Any, Callable[[str], str | None]]],
    alone: bool,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
) -> PeftFiles:
    """An adapter's ``tensors`` as PEFT saves them, by ``Attachment.peft``; nothing where that is empty.

    ``alone``: it is attached to the language model alone. ``names``: of its backbones.
    """
    files = {}
    for side, (settings, name_of) in peft.items():
        with tempfile.TemporaryDirectory() as folder:
            settings.save_pretrained(folder)
            values = json.loads((Path(folder) / PEFT_CONFIG).read_text())
        own = {ours: tensor for name, tensor in tensors.items() if (ours := name_of(name))}
        files["" if alone else PEFT_FOLDERS[side]] = {**values, "base_model_name_or_path": names[side]}, own
    return files


def method_fields(method: str, settings: Section, base: PretrainedConfig, name: str, counts: Parameters) -> dict[str, Any]:
    """The fields of `Contents` that every adapter has: of a ``method`` with ``settings`` on the language model ``name``,
    whose own are ``base``."""
    return {
        "base_model_name_or_path": name,
        "base": base_shape(base).to_dict(),
        "adapter": {"name": method, **settings.to_dict()},
        "parameters": counts.to_dict(),
        "run": None,
    }


def flat(tensors: Tensors) -> dict[str, Tensor]:
    """group.name → a contiguous copy on the CPU that shares memory with nothing."""
    return flat_group({f"{group}.{name}": tensor for group, named in tensors.items() for name, tensor in named.items()})


def flat_group(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in named.items()}


def checksum(fields: Mapping[str, Any]) -> str:
    """sha256 of the fields but `EDITABLE`, as JSON with sorted keys and no spaces."""
    kept = {key: value for key, value in fields.items() if key not in EDITABLE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read(folder: str | Path, shapes: Shapes | None = None) -> Published:
    """Read a published adapter; CheckpointError, in one line, for whatever is torn, forged or of another format.

    ``shapes``: what the tensors must be (group.name → shape); others are refused before any is read.
    """
    folder = Path(folder)
    contents, weights = read_contents(folder)
    if shapes is not None:
        check_shapes(weights, contents.tensors, shapes)
    tensors = read_tensors(weights, contents.tensors)
    check_peft(folder, contents)
    return Published(folder, contents, tensors)


def read_contents(folder: Path) -> tuple[Contents, Path]:
    """A published adapter's configuration, and the file of its tensors."""
    if not is_published(folder):
        run = (folder / "config.yaml").is_file()
        mend = f"mitrain export {folder} --out DIR makes one of this run" if run else "give one from mitrain export"
        raise CheckpointError(f"{str(folder)!r} is no exported adapter (it has no {CONFIG}): {mend}")
    path, weights = (real(folder, name) for name in (CONFIG, WEIGHTS))
    values = parse_json(read_regular(path, CONFIG_LIMIT, MEND), path, MEND, finite=True)
    version = values.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} was not written by mitrain (it names no format): give one from mitrain export")
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, written by mitrain {str(values.get('mitrain_version'))[:20]}; this version"
            f" reads format {FORMAT}: {'upgrade mitrain' if version > FORMAT else MEND}"
        )
    contents = parse_contents(values, path)
    if contents.checksum != checksum(values):
        raise CheckpointError(
            f"{path} is corrupted or was edited (its checksum differs; only base_model_name_or_path may change): {MEND}"
        )
    return contents, weights


def check_peft(folder: Path, contents: Contents) -> None:
    """CheckpointError where PEFT's files are not the exported ones: what PEFT loads would differ from what we load."""
    known = {place + name for place in ("", *PEFT_FOLDERS.values()) for name in PEFT_FILES}
    for name, expected in (contents.peft or {}).items():
        if name not in known or expected.bytes > contents.tensors.bytes + CONFIG_LIMIT:
            raise CheckpointError(f"{folder / CONFIG} names no file of PEFT's: {name[:60]!r}: {MEND}")
        content = read_regular(real(folder, name), expected.bytes, MEND)
        if summed(content) != expected.to_dict():
            raise CheckpointError(
                f"{folder / name} was changed after the export ({WEIGHTS} still holds the exported weights): {MEND}"
            )


def real(folder: Path, name: str) -> Path:
    """The file ``name``, or what it is a link to where the Hub's cache keeps a repository: files beside its snapshots, in
    blobs.

    Other links are refused by one line: they may lead to anything.
    """
    path = folder / name
    if not path.is_symlink():
        return path
    # os.path: a link that leads to itself is no RuntimeError there
    folder, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs":
        return target
    raise CheckpointError(f"{path} is a link, and not within a repository of the Hub's cache: copy the folder with cp -rL")


def parse_contents(values: Mapping[str, Any], path: Path) -> Contents:
    try:
        return config.parse(Contents, dict(values))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {str(error)[:400]}") from None


def check_shapes(path: Path, expected: FileSum, shapes: Shapes) -> None:
    """CheckpointError where the file's header, all that is read here, does not describe tensors of ``shapes``."""
    size = regular_size(path, MEND)
    if size != expected.bytes:
        raise CheckpointError(f"{path} is torn or corrupted ({size} bytes, its configuration says {expected.bytes}): {MEND}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({str(error)[:100]}): {MEND}") from None
    if wrong := unlike(shapes, stored):
        raise CheckpointError(f"{path} does not fit the adapter's own configuration: {first_of(wrong)}: {MEND}")


def read_tensors(path: Path, expected: FileSum) -> dict[str, dict[str, Tensor]]:
    content = read_regular(path, expected.bytes, MEND)
    if len(content) != expected.bytes or hashlib.sha256(content).hexdigest() != expected.sha256:
        raise CheckpointError(f"{path} is torn or corrupted (its checksum differs from the configuration's): {MEND}")
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for key, tensor in parse_tensors(content, path, MEND).items():
        group, _, name = key.partition(".")
        if group not in groups or not name:
            raise CheckpointError(f"{path} holds {key[:60]!r}, which is of no part of an adapter: {MEND}")
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(f"{path}: {key[:60]!r} holds what is not finite: train it again or {MEND}")
        groups[group][name] = tensor
    return groups
