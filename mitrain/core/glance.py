"""A first look at what a command is given, before torch is imported, which takes seconds: keys, names, paths.

All that passes here is read again by what uses it; a key that is refused here is refused there in the same words.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mitrain.core import config, parsing, prepared, schema_values
from mitrain.core.errors import CheckpointError, ConfigError, DataError, ModelError, nearest

RESUME_OVERRIDES = (
    *("zero", "kernels", "telemetry", "wandb", "model.device", "train.checkpoint_activations", "train.check_largest"),
    "train.hang_minutes",
)
"""What decides where and how fast a run computes, and not what: it may change when a run is resumed."""


def look(path: str, assignments: Sequence[str] = (), loads: bool = False) -> None:
    """ConfigError for a configuration that cannot be read, has an unknown key, or a value that its key does not take; with
    ``loads``, where its models and data are to be loaded, ModelError or DataError for one that is not there."""
    values = config.override(config.read_file(path), assignments)
    if "torch" in sys.modules:  # the whole reading is as fast then, and it alone knows sections from outside the package
        return
    schema = json.loads((config.SHIPPED / "schema.json").read_text(encoding="utf-8"))
    look_at_keys(values, schema, schema["$defs"], "")
    with config.quoting(assignments):
        look_at_values(values, schema, schema["$defs"], "")
    if loads:
        look_at_models(values.get("model"))
        look_at_data(values.get("data"), schema["$defs"])


def look_at_keys(values: Any, body: Any, definitions: Mapping[str, Any], path: str) -> None:
    """``body``: the JSON schema of what stands at ``path``."""
    section = section_of(values, body, definitions, path)
    if not isinstance(values, dict) or section is None:
        return
    known = section.get("properties")
    for key, value in values.items():
        where = f"{path}.{key}".lstrip(".")
        if known is None:
            look_at_keys(value, section.get("additionalProperties"), definitions, where)
        elif key in known:
            look_at_keys(value, known[key], definitions, where)
        else:
            keys = sorted(name for name, field in known.items() if name != "name" or "const" not in field)
            raise ConfigError(f"unknown key {where!r}{nearest(str(key), keys)}: the keys here are {', '.join(keys)}")


def look_at_values(values: Any, body: Any, definitions: Mapping[str, Any], path: str) -> None:
    """As `look_at_keys`, whose keys are known by now. What settings must be to one another only the whole reading knows."""
    section = section_of(values, body, definitions, path)
    if section is None:
        return
    known = section.get("properties")
    if known is not None:
        schema_values.check(values, section, path)
    for key, value in values.items():
        field = section.get("additionalProperties") if known is None else known.get(key)
        look_at_values(value, field, definitions, f"{path}.{key}".lstrip("."))


def section_of(values: Any, body: Any, definitions: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """The schema of the section that ``values`` are of, of those that ``body`` allows; None where it is left open."""
    if not isinstance(body, dict) or not isinstance(values, dict):
        return None
    if "oneOf" not in body and "anyOf" not in body and "$ref" not in body:
        return body if "properties" in body or "additionalProperties" in body else None
    references = [one["$ref"] for one in body.get("oneOf", body.get("anyOf", [body])) if "$ref" in one]
    sections = [definitions[reference.rpartition("/")[2]] for reference in references]
    chosen = {field["const"]: s for s in sections for field in s["properties"].values() if "const" in field}
    if not chosen:
        return sections[0] if len(sections) == 1 else None
    if "oneOf" not in body:  # an encoder, which takes what its own name says unless it says it
        return chosen.get(values.get("takes", path.rpartition(".")[2])) if not values.get("joins") else None
    name = values.get("name")
    if isinstance(name, str) and name not in chosen:
        kinds = sorted(chosen)
        raise ConfigError(f"{path}.name={name!r} is not known{nearest(name, kinds)}: choose one of {kinds}")
    return chosen.get(name) if isinstance(name, str) else None


def look_at_models(model: Any) -> None:
    if not isinstance(model, dict):
        return
    encoders = model.get("encoders")
    named = {"model.llm": {"name": model.get("llm"), "shape": model.get("llm_shape")}}
    for key, part in encoders.items() if isinstance(encoders, dict) else ():
        named[f"model.encoders.{key}"] = part if isinstance(part, dict) else {"name": part}
    for where, part in named.items():
        name = part.get("name")
        if isinstance(name, str) and not part.get("shape") and name != "features" and not prepared.is_here(name):
            raise ModelError(f"{where}={name!r} {prepared.not_here(name)}")


def look_at_data(data: Any, definitions: Mapping[str, Any]) -> None:
    if not isinstance(data, dict):
        return
    source, root = data.get("source"), data.get("root")
    if isinstance(source, str):
        if not source.startswith("hf:"):
            prepared.find("data", source)
    elif isinstance(root, str):
        if not Path(root).expanduser().is_dir():
            raise DataError(f"data.root={root!r} is no folder{beside(root)}: give the folder that the data lies in")
        look_at_splits(data, Path(root).expanduser(), definitions)


def look_at_splits(data: Mapping[str, Any], root: Path, definitions: Mapping[str, Any]) -> None:
    """DataError where the table of a split that training reads is not there; of other data each format knows its files."""
    tables = [one for one in definitions.values() if {"splits", "columns"} <= one.get("properties", {}).keys()]
    known = next((one["properties"] for one in tables if one["properties"]["name"]["const"] == data.get("name")), None)
    if known is None:
        return
    splits = data.get("splits", known["splits"].get("default"))
    for split in ("train", "val"):
        name = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(name, str) or set(name) & set("*?[{") or (root / name).exists():
            continue  # several files, or none: which these are is known to the reader
        if split not in data.get("splits", ()) and data.get(f"{split}_share"):
            continue  # drawn from training's
        raise DataError(
            f"data.splits: there is no file {name!r} in {str(root)!r}{beside(str(root / name))}: give the {split} split's as"
            f" data.splits.{split}"
        )


def run_folder(folder: str) -> None:
    """CheckpointError where ``folder`` is nothing that a run could be: no folder with files, no repository's name."""
    path = Path(folder)
    if path.is_dir():
        if any(one.is_file() for one in path.iterdir()):
            return
    elif not path.exists() and path.parts[0] == folder.partition("/")[0] and not path.parent.exists():
        return  # USER/NAME on the Hub
    raise CheckpointError(
        f"{folder!r} is no run folder (it has no config.yaml){beside(folder)}: give one that mitrain train made"
    )


def resume_overrides(assignments: Sequence[str]) -> None:
    """ConfigError for one that changes what a resumed run computes."""
    for assignment in assignments:
        if not f"{assignment.partition('=')[0]}.".startswith(tuple(f"{key}." for key in RESUME_OVERRIDES)):
            raise ConfigError(
                f"{assignment!r} would change what a resumed run computes: give --allow-changes too, or start a new run"
                f" (without it {', '.join(RESUME_OVERRIDES)} may change)"
            )


def words(text: str, candidates: Sequence[str] | None = None) -> None:
    """ConfigError for what the user wrote that is no text."""
    if isinstance(candidates, str):
        raise ConfigError(f"candidates={candidates[:40]!r} is one text: give a list of them")
    for name, given in (("--text", text), *(("--candidates", one) for one in candidates or ())):
        if not parsing.is_whole(given):
            raise ConfigError(f"{name} {given[:40]!r} holds half a character: write it in UTF-8")


def files(paths: Iterable[str]) -> None:
    """DataError for the first of the user's files that is not there."""
    for path in paths:
        if not Path(path).expanduser().exists():
            raise DataError(f"there is no file {path!r}{beside(path)}: give one that is there")


def beside(path: str) -> str:
    """What lies where ``path`` should be and is named alike, as the end of a message."""
    try:
        return nearest(Path(path).name, sorted(one.name for one in Path(path).expanduser().parent.iterdir()))
    except OSError:
        return ""
