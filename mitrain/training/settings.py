"""Every setting that a configuration can have, with its type, its default and what it means.

Types and defaults are the sections' own (pydantic); what a setting means stands once, as the comment beside it in
``configs/reference``, and is read from there.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.json_schema import models_json_schema

from mitrain.core import config
from mitrain.core.config import KINDS, Section, section_in
from mitrain.core.errors import ConfigError
from mitrain.core.markdown import table
from mitrain.models.encoders import ENCODERS
from mitrain.training.schema import RunConfig

REFERENCE = config.SHIPPED / "reference"
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
ENCODER = "model.encoders.NAME"
DRAFT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Setting:
    """``key`` is dotted; ``where`` says of which kind of adapter, task, data or encoder it is, as ``adapter.name=mit`` (of
    all: empty). ``default`` is None where the setting must be given (``required``), or where null is the default."""

    key: str
    where: str
    type: str
    required: bool
    default: Any
    meaning: str


@cache
def settings() -> tuple[Setting, ...]:
    """All of them, those of every run first."""
    found = []
    for name, field in RunConfig.model_fields.items():
        if name not in KINDS:
            found += list(of_field(name, field, "", name))
        if name == "model":
            for takes, (section, _) in ENCODERS.items():
                found += list(of_section(section, ENCODER, f"takes={takes}", f"encoder[{takes}]"))
    for kind, name, section in sections():
        found += list(of_section(section, kind, f"{kind}.name={name}", f"{kind}[{name}]"))
    return tuple(found)


def sections() -> Iterator[tuple[str, str, type[Section]]]:
    """Kind, name and class of every section of mitrain's own that is chosen by its name."""
    for kind in ("adapter", "task", "data"):
        for name, section in KINDS[kind].items():
            if section.__module__.startswith("mitrain."):
                yield kind, name, section


def of_section(section: type[Section], key: str, where: str, path: str) -> Iterator[Setting]:
    for name, field in section.model_fields.items():
        yield from of_field(f"{key}.{name}", field, where, f"{path}.{name}")


def of_field(key: str, field: Any, where: str, path: str) -> Iterator[Setting]:
    if key == "model.encoders":
        return
    inner = section_in(field.annotation)
    if inner is not None:
        yield from of_section(inner, key, where, path)
        return
    required = field.is_required()
    default = None if required else json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))
    bounds = [
        f"{sign} {value:g}"
        for m in field.metadata
        for a, sign in BOUNDS.items()
        if (value := getattr(m, a, None)) is not None
    ]
    shown = " ".join([type_of(field.annotation), ", ".join(bounds)]).strip()
    yield Setting(key, where, shown, required, default, meaning_of(path))


def type_of(annotation: Any) -> str:
    """An annotation in words."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(type_of(one) for one in inner if one is not NoneType) + (" or null" if NoneType in inner else "")
    if origin in (tuple, list):
        return f"list of {type_of(inner[0])}"
    if origin in (dict, Mapping):
        return f"mapping to {type_of(inner[1])}"
    return type_of(inner[0]) if inner else "mapping"  # Annotated


def meaning_of(path: str) -> str:
    """What the setting ``path`` means; what all kinds of data, or all encoders, have is said of one of them."""
    kind, bracket, name = path.partition("[")
    if path in meanings() or not bracket or kind not in ("data", "encoder"):
        return meanings().get(path, "")
    key = name.partition("].")[2]
    return next((text for other, text in meanings().items() if re.fullmatch(rf"{kind}\[.*]\.{re.escape(key)}", other)), "")


@cache
def meanings() -> dict[str, str]:
    """What each setting means: the comments of `REFERENCE`, by names as ``adapter[mit].rank`` and ``train.steps``."""
    found: dict[str, str] = {}
    for path in sorted(REFERENCE.glob("*.yaml"), key=lambda path: path.stem != "mit"):
        text = path.read_text(encoding="utf-8")
        for name, comment in comments(yaml.compose(text), text.splitlines(), ""):
            found.setdefault(name, comment)
    return found


def comments(node: Any, lines: list[str], path: str) -> Iterator[tuple[str, str]]:
    """The setting in every line that ends in a comment, and the comment."""
    for key, value in node.value:
        name = named(path, key.value, value)
        if value.id == "mapping":
            yield from comments(value, lines, name)
        mark = key if value.id == "mapping" else value  # of a mapping the comment stands beside its name
        _, hash_sign, comment = lines[mark.end_mark.line][mark.end_mark.column :].partition("#")
        if hash_sign:
            yield name, comment.strip()


def named(path: str, key: str, value: Any) -> str:
    """The name of what a mapping at ``path`` holds under ``key``."""
    given = {k.value: v.value for k, v in value.value} if value.id == "mapping" else {}
    if path == "model.encoders":
        return f"encoder[{given.get('takes', key)}]"
    if not path and key in ("adapter", "task", "data"):
        return f"{key}[{given['name']}]"
    return f"{path}.{key}" if path else key


def find(part: str) -> list[Setting]:
    """The settings whose key or kind begins with ``part``: ``train``, ``adapter.rank``, ``mit``. ConfigError for none."""
    kinds = {setting.where.partition("=")[2] for setting in settings()}
    if part in kinds:
        return [setting for setting in settings() if setting.where.partition("=")[2] == part]
    keys = {setting.key for setting in settings()}
    found = [setting for setting in settings() if f"{setting.key}.".startswith(f"{part}.")]
    if not found:
        parts = {key.rsplit(".", n)[0] for key in keys for n in range(3)} | kinds
        raise ConfigError(
            f"no setting begins with {part!r}{config.nearest(part, parts)}: mitrain config --keys names them all"
        )
    return found


def as_text(found: list[Setting]) -> str:
    """A setting a line, under a heading for each kind of section."""
    lines = []
    for head, group in groupby(found, heading):
        lines += ["", head] if lines else [head]
        for one in group:
            given = "required" if one.required else f"= {shown(one.default)}"
            lines.append(f"  {one.key:34s} {given:28s} {one.type}{': ' if one.meaning else ''}{one.meaning}")
    return "\n".join(lines)


def as_markdown(found: list[Setting]) -> str:
    lines = []
    for head, group in groupby(found, heading):
        cells = [
            (f"`{one.key}`", one.type, "required" if one.required else f"`{shown(one.default)}`", one.meaning)
            for one in group
        ]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        lines += ["", f"## {head}", "", *table(("setting", "type", "default", "meaning"), rows)]
    return "\n".join(lines).lstrip()


def heading(setting: Setting) -> str:
    top = setting.key.partition(".")[0] if "." in setting.key else "every run"
    if setting.key.startswith(ENCODER):
        top = ENCODER
    return f"{top} with {setting.where}" if setting.where else top


def shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def json_schema() -> dict[str, Any]:
    """A JSON schema of a run's configuration: editors complete keys by it, and say what they mean."""
    chosen = [(kind, name, section) for kind, name, section in sections()]
    encoders = [("encoder", takes, section) for takes, (section, _) in ENCODERS.items()]
    classes = [RunConfig, *(section for *_, section in (*chosen, *encoders))]
    places, whole = models_json_schema([(section, "validation") for section in classes])
    definitions = whole["$defs"]
    unions: dict[str, list[Any]] = {}
    for kind, name, section in (*chosen, *encoders):
        reference = places[section, "validation"]
        body = definitions[reference["$ref"].rpartition("/")[2]]
        key = "takes" if kind == "encoder" else "name"
        body["properties"] = {key: {"const": name}, **{k: v for k, v in body["properties"].items() if k != key}}
        required = {*body.get("required", ()), key} - {"takes"}  # left out, it is the encoder's own name
        body["required"] = sorted(required)
        describe(body, f"{kind}[{name}]")
        unions.setdefault(kind, []).append(reference)
    top = definitions[places[RunConfig, "validation"]["$ref"].rpartition("/")[2]]
    for kind in ("adapter", "task", "data"):
        top["properties"][kind] = {"oneOf": unions[kind]}
    model = definitions["ModelConfig"]["properties"]
    model["encoders"] = {"type": "object", "additionalProperties": {"anyOf": [{"type": "string"}, *unions["encoder"]]}}
    for body, path in bodies(top, definitions, ""):
        describe(body, path)
    return {"$schema": DRAFT, "title": "mitrain run", **{k: v for k, v in top.items() if k != "title"}, "$defs": definitions}


def schema_text(schema: dict[str, Any]) -> str:
    """The schema as a file: a definition a line, so that a change shows as one."""
    parts = {**schema, "$defs": None}
    lines = [f"{json.dumps(name)}: {json.dumps(body, ensure_ascii=False)}" for name, body in schema["$defs"].items()]
    head = [
        f"{json.dumps(name)}: {json.dumps(body, ensure_ascii=False)}" for name, body in parts.items() if body is not None
    ]
    return "{" + ",\n".join(head) + ',\n"$defs": {\n' + ",\n".join(lines) + "\n}}\n"


def bodies(body: Any, definitions: Any, path: str) -> Iterator[tuple[Any, str]]:
    """The schema of a section and of the sections in it, each with its place in a configuration."""
    yield body, path
    for name, field in body["properties"].items():
        reference = field.get("$ref")
        if reference:
            yield from bodies(definitions[reference.rpartition("/")[2]], definitions, f"{path}.{name}".lstrip("."))


def describe(body: Any, path: str) -> None:
    """Give a section's settings what `meanings` knows of them."""
    for name, field in body["properties"].items():
        meaning = meaning_of(f"{path}.{name}".lstrip("."))
        if meaning and "$ref" not in field:
            field["description"] = meaning
