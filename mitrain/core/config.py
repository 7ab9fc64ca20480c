"""Typed, strict configuration: YAML ⇄ sections ⇄ ``a.b=c`` overrides.

A *section* is a frozen pydantic model; unknown keys are errors that name the nearest key. Sections of which there
are several kinds (``adapter``, ``task``, ``data``) are chosen by their ``name`` key: a class declared as
``class MiTConfig(Section, kind="adapter", name="mit")`` is found by that name as soon as its module is imported.
"""

import contextlib
import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from mitrain.core import parsing
from mitrain.core.errors import ConfigError, nearest
from mitrain.core.user_code import NAMED

LARGEST, LARGEST_FLOAT = 1 << 63, 3.4e38
STYLED = tuple("'\"|>!")  # how text begins in YAML that says itself where it ends
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
PATTERNS = {NAME: "take letters, digits and . _ - (64 at most, first a letter or digit)"}
PATTERNS[NAMED] = "give the import path of a function, as package.module:function"
WORDS = {"string_type": "text", "bool_type": "true or false", "bool_parsing": "true or false", "none_required": "null"}
WORDS |= dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number")
WORDS |= dict.fromkeys(("float_type", "float_parsing"), "a number")
WORDS |= dict.fromkeys(("tuple_type", "list_type"), "a list, as [a, b]")
WORDS |= dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "a mapping, as {key: value}")

KINDS: dict[str, dict[str, type["Section"]]] = {}
SHIPPED = Path(__file__).parents[1] / "configs"  # a link to the clone's, a folder in a wheel


class Section(BaseModel):
    """One component's configuration: immutable, no unknown keys, no silent truncation.

    What a setting means stands once, as the comment beside it in ``configs/reference``; a class says what is not told there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    section_name: ClassVar[str] = ""
    largest: ClassVar[int] = 1 << 31
    """Every whole number is below it: none counts so many steps, samples, widths or pixels."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: Any) -> Any:
        """Python counts true as 1, and so pydantic does."""
        parts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, bool) for part in parts) and not has_bool(cls.model_fields[info.field_name].annotation):
            raise ValueError("true and false are no value here")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, int) and abs(part) >= cls.largest for part in parts):
            raise ValueError(f"give a number below 2^{cls.largest.bit_length() - 1}")
        return value

    def __init_subclass__(cls, kind: str | None = None, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if kind and name:
            cls.section_name = name
            KINDS.setdefault(kind, {})[name] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every default written out."""
        return self.model_dump(mode="json")


def has_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(isinstance(one, bool) or has_bool(one) for one in get_args(annotation))


def choose(kind: str, value: Any) -> "Section":
    """The section of ``kind`` that ``value`` (a section or a mapping with a ``name``) describes."""
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{kind} must be a mapping with a 'name' key, not {value!r}: choose one of {sorted(KINDS[kind])}")
    name = value.get("name")
    if not isinstance(name, str) or name not in KINDS[kind]:
        raise ConfigError(
            f"{kind}.name={name!r} is not known{nearest(str(name), KINDS[kind])}: choose one of {sorted(KINDS[kind])}"
        )
    return parse(KINDS[kind][name], {k: v for k, v in value.items() if k != "name"}, where=kind)


class Told(ValueError):
    """A ConfigError of an inner section, on its way through pydantic."""

    def __init__(self, error: ConfigError):
        super().__init__(str(error))
        self.error = error


def parse(schema: type[Section], values: Any, where: str = "") -> Any:
    """Build ``schema`` from plain values; raise ConfigError with one line for the first thing that is wrong."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where or 'the configuration'} must be a mapping, not {type(values).__name__}: write 'key: value' lines"
        )
    check_values(values, where)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise explained(schema, error, where) from None
    except RecursionError:
        raise ConfigError(f"{where or 'the configuration'} is nested too deeply: flatten it") from None


def check_values(value: Any, where: str) -> None:
    """ConfigError for what no setting means: numbers beyond 64 bits or float32, halves of characters, a NUL in a name."""
    if isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            check_values(key, where)
            check_values(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, int) and abs(value) >= LARGEST:
        raise ConfigError(f"{where} is a number of {value.bit_length()} bits: give one below 2^63")
    elif isinstance(value, float) and LARGEST_FLOAT < abs(value) < math.inf:
        raise ConfigError(f"{where}={value:g} is more than float32 holds: give a smaller number")
    elif isinstance(value, str) and (not parsing.is_whole(value) or "\0" in value):
        raise ConfigError(f"{where}={value[:60]!r} holds half a character, or none (NUL): write it in UTF-8")


def explained(schema: type[Section], error: ValidationError, where: str) -> ConfigError:
    """The ConfigError for the first thing that is wrong; its ``text_at`` is the key that should have been text."""
    first, *others = error.errors()
    if first["type"] == "missing":  # a misspelt key says more than the one that it should have been
        beside = (e for e in others if e["type"] == "extra_forbidden" and e["loc"][:-1] == first["loc"][:-1])
        first = next(beside, first)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Told):
        return cause.error
    loc = place_of(schema, first["loc"])
    path = ".".join([where, *map(str, loc)]).strip(".")
    if first["type"] == "extra_forbidden":
        known = known_keys(schema, loc[:-1])
        hint = nearest(str(loc[-1]), known)
        return ConfigError(f"unknown key {path!r}{hint}: the keys here are {', '.join(sorted(known))}")
    if first["type"] == "missing":
        return ConfigError(f"missing key {path!r}: add it to the configuration or give {path}=VALUE on the command line")
    same_place = [e for e in (first, *others) if place_of(schema, e["loc"]) == loc]
    reason = str(cause) if cause else wanted(same_place)
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        reason += ", in quotes as YAML takes it for something else"
    refusal = ConfigError(f"{path}={repr(first.get('input'))[:80]}: {reason}" if path else reason)
    refusal.text_at = path if first["type"] == "string_type" else ""
    return refusal


def place_of(schema: Any, loc: tuple) -> tuple:
    """``loc`` without pydantic's own words: of a key that may be one of several things, it appends which was tried."""
    place: list[Any] = []
    for key in loc:
        fields = getattr(schema, "model_fields", None)
        inner = get_args(schema)
        if fields is not None:
            schema = fields[key].annotation if key in fields else None
        elif isinstance(schema, UnionType) or get_origin(schema) is Union:
            sections = [one for one in inner if hasattr(one, "model_fields")]
            others = [one for one in inner if one is not type(None)]
            if len(others) > 1:
                break
            return (*place, *place_of((sections or others)[0], loc[len(place) :]))
        elif inner:
            schema = inner[-1] if get_origin(schema) is dict else inner[0]
        place.append(key)
    return tuple(place)


def wanted(errors: Sequence[Any]) -> str:
    """What would have been right, in plain words, by all the errors of one value."""
    kinds = [WORDS.get(e["type"]) for e in errors]
    if None not in kinds:
        return f"give {' or '.join(dict.fromkeys(kinds))}"
    shaped = [PATTERNS.get(e["ctx"]["pattern"], e["msg"]) for e in errors if e["type"] == "string_pattern_mismatch"]
    first = [] if errors[0]["type"] == "string_pattern_mismatch" else [errors[0]["msg"]]
    return ", or ".join(first + shaped)


def known_keys(schema: Any, path: tuple) -> list[str]:
    """The keys of the section that ``path`` leads to, also through mappings and lists of sections."""
    for key in path:
        fields = getattr(schema, "model_fields", None)
        schema = section_in(schema) if fields is None else fields[key].annotation if key in fields else None
    return list(getattr(section_in(schema), "model_fields", {}))


def section_in(annotation: Any) -> Any:
    """The section that an annotation such as ``dict[str, Section]`` or ``Section | None`` speaks of, or None."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):  # an Annotated has its type's attributes, too
        return annotation
    return next((section for inner in get_args(annotation) if (section := section_in(inner))), None)


def read_yaml(text: str, where: str) -> Any:
    try:
        return parsing.parse_yaml(text)
    except parsing.Unreadable as error:
        raise ConfigError(f"{where} {error}") from None


def shipped() -> dict[str, Path]:
    """The configurations that come with mitrain, by the name that stands for one."""
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in sorted(SHIPPED.rglob("*.yaml"))}


def summary(path: Path) -> str:
    """The first sentence of the comment that a configuration begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ") for line in lines if not line.startswith("# yaml-language-server"))
    return text.partition(". ")[0].rstrip(".") + "."


def located(path: str | Path) -> Path:
    """The file itself, or the shipped configuration of that name where there is no such file."""
    return Path(path) if Path(path).exists() else shipped().get(str(path), Path(path))


def read_file(path: str | Path) -> dict[str, Any]:
    """The plain mapping in a YAML file, or in the shipped configuration of that name."""
    path = located(path)
    try:
        text = parsing.read_bytes(path, parsing.YAML_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        beside = sorted(str(other) for other in Path(path).parent.glob("*.yaml"))
        hint = nearest(str(path), beside) or nearest(Path(path).stem, shipped())
        raise ConfigError(f"no configuration file {str(path)!r}{hint}: mitrain config names the shipped ones") from None
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
        node[last] = assigned(path, text)
    return values


def assigned(path: str, text: str) -> Any:
    """The value that YAML reads in ``text``; ConfigError where that is text in part, a comment or nothing at all."""
    try:
        value = parsing.parse_yaml(text)
    except parsing.Unreadable as error:
        raise ConfigError(f"the value of {path} {error}: {in_quotes(path, text)}") from None
    lost = isinstance(value, str) and value != text and text.lstrip()[:1] not in STYLED
    if lost or (value is None and text.strip() not in parsing.CONSTANTS):
        raise ConfigError(f"the value of {path}, {text!r}, is {value!r} in YAML: {in_quotes(path, text)}")
    return value


def in_quotes(path: str, text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return f"if it is text, put it in quotes: {shlex.quote(f'{path}={quoted}')}"


@contextlib.contextmanager
def quoting(assignments: Iterable[str]) -> Iterator[None]:
    """Where a value that ``assignments`` give should have been text, the error says how to write it as such."""
    texts = {path.strip(): text for path, _, text in (a.partition("=") for a in assignments)}
    try:
        yield
    except ConfigError as error:
        at = getattr(error, "text_at", "")
        if at not in texts:
            raise
        raise ConfigError(f"{error}; {in_quotes(at, texts[at])}") from None


def digest(values: Any) -> str:
    """Twelve hex digits that name a configuration (or any JSON value) by its content."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
