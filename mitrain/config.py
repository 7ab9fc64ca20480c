"""Typed, strict configuration: YAML ⇄ sections ⇄ ``a.b=c`` overrides.

A *section* is a frozen pydantic model; unknown keys are errors that name the nearest key. Sections of which there
are several kinds (``adapter``, ``task``, ``data``) are chosen by their ``name`` key: a class declared as
``class MiTConfig(Section, kind="adapter", name="mit")`` is found by that name as soon as its module is imported.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mitrain import parsing
from mitrain.errors import ConfigError

KINDS: dict[str, dict[str, type["Section"]]] = {}


class Section(BaseModel):
    """One component's configuration: immutable, no unknown keys, no silent truncation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    section_name: ClassVar[str] = ""

    def __init_subclass__(cls, kind: str | None = None, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if kind and name:
            cls.section_name = name
            KINDS.setdefault(kind, {})[name] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every default written out."""
        return self.model_dump(mode="json")


def choose(kind: str, value: Any) -> "Section":
    """The section of ``kind`` that ``value`` (a section or a mapping with a ``name``) describes."""
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict):
        raise ConfigError(
            f"{kind} must be a mapping with a 'name' key, not {value!r}: choose one of {sorted(KINDS[kind])}"
        )
    name = value.get("name")
    if not isinstance(name, str) or name not in KINDS[kind]:
        raise ConfigError(
            f"{kind}.name={name!r} is not known{nearest(str(name), KINDS[kind])}: choose one of {sorted(KINDS[kind])}"
        )
    return parse(KINDS[kind][name], {k: v for k, v in value.items() if k != "name"}, where=kind)


def nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def parse(schema: type[Section], values: Any, where: str = "") -> Any:
    """Build ``schema`` from plain values; raise ConfigError with one line for the first thing that is wrong."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where or 'the configuration'} must be a mapping, not {type(values).__name__}: write 'key: value' lines"
        )
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(schema, error, where)) from None
    except RecursionError:
        raise ConfigError(f"{where or 'the configuration'} is nested too deeply: flatten it") from None


def explain(schema: type[Section], error: ValidationError, where: str) -> str:
    first, *others = error.errors()
    if first["type"] == "missing":  # a misspelt key says more than the one that it should have been
        beside = (e for e in others if e["type"] == "extra_forbidden" and e["loc"][:-1] == first["loc"][:-1])
        first = next(beside, first)
    path = ".".join([where, *map(str, first["loc"])]).strip(".")
    if first["type"] == "extra_forbidden":
        known = known_keys(schema, first["loc"][:-1])
        hint = nearest(str(first["loc"][-1]), known)
        return f"unknown key {path!r}{hint}: the keys here are {', '.join(sorted(known))}"
    if first["type"] == "missing":
        return f"missing key {path!r}: add it to the configuration or give {path}=VALUE on the command line"
    cause = first.get("ctx", {}).get("error")
    reason = str(cause) if cause else first["msg"]
    return f"{path}={repr(first.get('input'))[:80]}: {reason}" if path else reason


def known_keys(schema: Any, path: tuple) -> list[str]:
    """The keys of the section that ``path`` leads to, also through mappings and lists of sections."""
    for key in path:
        fields = getattr(schema, "model_fields", None)
        schema = section_in(schema) if fields is None else fields[key].annotation if key in fields else None
    return list(getattr(section_in(schema), "model_fields", {}))


def section_in(annotation: Any) -> Any:
    """The section that an annotation such as ``dict[str, Section]`` or ``Section | None`` speaks of, or None."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_in(inner))), None)


def read_yaml(text: str, where: str) -> Any:
    try:
        return parsing.parse_yaml(text)
    except parsing.Unreadable as error:
        raise ConfigError(f"{where} {error}") from None


def read_file(path: str | Path) -> dict[str, Any]:
    """The plain mapping in a YAML file."""
    try:
        text = parsing.read_bytes(path, parsing.YAML_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {str(path)!r}: the shipped ones are in configs/") from None
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, parsing.Unreadable) else f"cannot be read ({error})"
        raise ConfigError(f"{str(path)!r} {reason}: give a YAML text file") from None
    values = read_yaml(text, repr(str(path)))
    if not isinstance(values, dict):
        raise ConfigError(f"{str(path)!r} holds no mapping: write 'key: value' lines")
    return values


def override(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply ``a.b=c`` assignments (values are YAML) to a copy of ``values``."""
    values = json.loads(json.dumps(values, default=str))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"{assignment!r} is not an override: write key=value, for example train.steps=100")
        *parents, last = path.strip().split(".")
        node = values
        for key in parents:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{path!r}: {key!r} is a value, not a section: override it whole")
            node = child
        node[last] = read_yaml(text, f"the value of {path}")
    return values


def digest(values: Any) -> str:
    """Twelve hex digits that name a configuration (or any JSON value) by its content."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
