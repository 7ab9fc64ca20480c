"""Typed configuration: strict keys, YAML as users write it, overrides, digests."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from mitrain import config
from mitrain.config import Section
from mitrain.errors import ConfigError


class Inner(Section):
    rate: float = 1e-3
    layers: list[int] | str = "last third"


class Outer(Section):
    steps: int = Field(10, ge=1)
    inner: Inner = Inner()
    name: str


class Red(Section, kind="test-colour", name="red"):
    depth: int = 1


def test_values_and_defaults():
    parsed = config.parse(Outer, {"name": "a", "inner": {"rate": 1e-5}})
    assert parsed.steps == 10 and parsed.inner.rate == 1e-5 and parsed.inner.layers == "last third"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "a", "inner": {"rat": 1}}, ["inner.rat", "'rate'", "layers"]),
        ({"name": "a", "stepz": 1}, ["stepz", "'steps'"]),
        ({"name": "a", "inner": {"rate": "fast"}}, ["inner.rate", "'fast'"]),
        ({"name": "a", "steps": 0}, ["steps=0", "greater than or equal to 1"]),
        ({"name": "a", "inner": {"rate": float("nan")}}, ["inner.rate", "finite"]),
        ({}, ["missing key 'name'", "name=VALUE"]),
        ([1], ["must be a mapping"]),
    ],
)
def test_errors_are_one_line_that_says_where(values, words):
    with pytest.raises(ConfigError) as error:
        config.parse(Outer, values)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_yaml_floats_and_duplicate_keys():
    assert config.read_yaml("a: 1e-5\nb: 2.\nc: .5\nd: 7\ne: 1.2.3", "x") == {
        "a": 1e-5,
        "b": 2.0,
        "c": 0.5,
        "d": 7,
        "e": "1.2.3",
    }
    with pytest.raises(ConfigError, match=r"'a' stands twice \(line 2\)"):
        config.read_yaml("a: 1\na: 2", "x")


def test_override_parses_values_and_copies():
    values = {"train": {"steps": 1}}
    changed = config.override(values, ["train.steps=5", "train.lr=1e-4", "model.vision=[a, b]"])
    assert changed == {"train": {"steps": 5, "lr": 1e-4}, "model": {"vision": ["a", "b"]}}
    assert values == {"train": {"steps": 1}}


@pytest.mark.parametrize("text", ["train.steps", "=3", "train.steps.deep=3", "a=[1"])
def test_bad_overrides_are_config_errors(text):
    with pytest.raises(ConfigError):
        config.override({"train": {"steps": 1}}, [text])


def test_sections_are_chosen_by_name():
    assert config.choose("test-colour", {"name": "red", "depth": 3}) == Red(depth=3)
    with pytest.raises(ConfigError, match="did you mean 'red'"):
        config.choose("test-colour", {"name": "rad"})


def test_digest_follows_content_not_order():
    assert config.digest({"a": 1, "b": 2}) == config.digest({"b": 2, "a": 1})
    assert config.digest({"a": 1}) != config.digest({"a": 2})


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_value_or_a_config_error(text):
    try:
        values = config.read_yaml(text, "fuzz")
        config.parse(Outer, values)
    except ConfigError as error:
        assert "\n" not in str(error)
