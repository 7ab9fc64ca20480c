"""A section's values against its JSON schema, in the words that the sections themselves have, and without importing them.

The sections stand beside what they configure, and so import torch. From their schema a section of the same types and bounds
is made here; what only code says (validators of one setting or of several) is left to the whole reading.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import Field, WrapValidator, create_model

from mitrain.core import config
from mitrain.core.config import Section

PLAIN = {"integer": int, "number": float, "string": str, "boolean": bool, "null": None}
BOUNDS = {
    "minimum": "ge",
    "exclusiveMinimum": "gt",
    "maximum": "le",
    "exclusiveMaximum": "lt",
    "pattern": "pattern",
    "minLength": "min_length",
    "maxLength": "max_length",
    "minItems": "min_length",
    "maxItems": "max_length",
}


def check(values: Mapping[str, Any], body: Mapping[str, Any], where: str) -> None:
    """ConfigError for the first of ``values`` that its key does not take, or the first required key that is missing.

    ``body``: the JSON schema of the section at ``where``.
    """
    fields: dict[str, Any] = {}
    for key, field in body["properties"].items():
        section = "$ref" in field and isinstance(values.get(key), Mapping)  # is looked at by itself
        given = key in values and "const" not in field and not section
        required = key in body.get("required", ()) and key not in values
        if given or required:
            fields[key] = (annotation(field, values.get(key)), ...)
    made = create_model(body.get("title", "Section"), __base__=Section, **fields)
    config.parse(made, {key: values[key] for key in fields if key in values}, where)


def annotation(field: Mapping[str, Any], value: Any) -> Any:
    """The type of a setting from its JSON schema; ``value``: what it is given."""
    if "$ref" in field:
        return dict
    if "errorMessage" in field:
        return Annotated[union(field, value), WrapValidator(saying(field["errorMessage"]))]
    if "anyOf" in field:
        return union(field, value)
    if "const" in field or "enum" in field:
        return Literal[tuple(field.get("enum", [field.get("const")]))]
    return Annotated[plain(field, value), Field(**limits(field))] if limits(field) else plain(field, value)


def union(field: Mapping[str, Any], value: Any) -> Any:
    if any("$ref" in one for one in field["anyOf"]):
        return Any
    # Where text is taken, a whole number is one that somebody did not put in quotes: the words are those about text.
    parts = field["anyOf"]
    if {"type": "string"} in parts and type(value) is not int:
        parts = [one for one in parts if one.get("type") != "integer"]
    return Union[tuple(annotation(one, value) for one in parts)]  # noqa: UP007 - of as many as there are


def limits(field: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: field[name] for name, ours in BOUNDS.items() if name in field and "prefixItems" not in field}


def plain(field: Mapping[str, Any], value: Any) -> Any:
    kind = field.get("type")
    if kind == "array" and "prefixItems" in field:
        return tuple[tuple(annotation(one, None) for one in field["prefixItems"])]
    if kind == "array":
        return tuple[annotation(field.get("items", {}), None), ...]
    if kind == "object":
        inner = field.get("additionalProperties")
        return dict[str, annotation(inner, None) if isinstance(inner, dict) else Any]
    return PLAIN.get(kind, Any)


def saying(words: str) -> Any:
    """A validator whose error says ``words``."""

    def validate(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValueError:
            raise ValueError(words) from None

    return validate
