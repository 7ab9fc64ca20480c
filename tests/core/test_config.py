"""Typed configuration: strict keys, YAML as users write it, overrides, digests."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from pydantic import Field

from mitrain.cli import main
from mitrain.core import config, parsing
from mitrain.core.config import Section
from mitrain.core.errors import ConfigError

TENFOLD = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


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
    with pytest.raises(ConfigError, match=r"x has the key 'a' twice \(line 2\)"):
        config.read_yaml("a: 1\na: 2", "x")


def test_override_parses_values_and_copies():
    values = {"train": {"steps": 1}}
    changed = config.override(values, ["train.steps=5", "train.lr=1e-4", "model.encoders=[a, b]"])
    assert changed == {"train": {"steps": 5, "lr": 1e-4}, "model": {"encoders": ["a", "b"]}}
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
@drawn(st.text(max_size=60))
def test_any_text_is_a_value_or_a_config_error(text):
    try:
        values = config.read_yaml(text, "fuzz")
        config.parse(Outer, values)
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TENFOLD, "holds more than 100000 values"),
        ("name: run\nx: &x [*x]\n", r"refers to \*x in line 2"),
        ("name: run\n? !!binary aGk=\n: 1\n", "has the tag 'tag:yaml.org,2002:binary' in line 2"),
        ("name: run\n1: 1\n", "has the key 1 in line 2, which is no text"),
        (None, "is not a plain file"),
    ],
)
def test_hostile_files_are_refused_by_every_command_that_reads_a_configuration(tmp_path, capsys, text, said):
    path = Path("/dev/zero")
    if text is not None:
        (path := tmp_path / "config.yaml").write_text(text)
    commands = [["train", path, "--dry-run"], ["train", path], ["data", "inspect", path], ["compare", path]]
    if text is not None:
        commands += [["train", "--resume", tmp_path], ["eval", tmp_path], ["export", tmp_path, "--out", tmp_path / "o"]]
        commands += [["predict", tmp_path, "--image", path, "--text", "a"], ["report", tmp_path, "--out", tmp_path]]
    for words in commands:
        assert main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mitrain: ") and re.search(said, line), words


def test_a_configuration_is_written_as_it_will_be_read(tmp_path):
    names = ["08", "0o7", "1e5", "1:30", "yes", "\x85"]
    (tmp_path / "a.yaml").write_text(parsing.dump_yaml({"names": names}), encoding="utf-8")
    assert config.read_file(tmp_path / "a.yaml") == {"names": names}


class Fields(Section):
    text: str = ""
    texts: tuple[str, ...] = ()
    whole: int = 1
    number: float | None = None
    layers: str | tuple[int, ...] = "all"
    flag: bool = False
    table: dict[str, Inner] = {}
    inner: Inner | None = None
    anything: Any = None
    name: str = Field("a", pattern=config.NAME)


def given(*assignments):
    with config.quoting(assignments):
        return config.parse(Fields, config.override({}, assignments))


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("text=Question: {prompt}", """if it is text, put it in quotes: 'text="Question: {prompt}"'"""),
        ("text={prompt}", """text={'prompt': None}: give text; if it is text, put it in quotes: 'text="{prompt}"'"""),
        (
            "text=#1 {prompt}",
            """'#1 {prompt}', is None in YAML: if it is text, put it in quotes: 'text="#1 {prompt}"'""",
        ),
        ("text=*{prompt}*", """put it in quotes: 'text="*{prompt}*"'"""),
        ("text=What? #1", """'What? #1', is 'What?' in YAML: if it is text, put it in quotes: 'text="What? #1"'"""),
        ("text=It: ", """put it in quotes: 'text="It: "'"""),
        ("text=It ", "'It ', is 'It' in YAML"),
        ("text=two\nlines", "is 'two lines' in YAML"),
        ("text=&x y", "is 'y' in YAML"),
        (
            "text=1.10",
            """text=1.1: give text, in quotes as YAML takes it for something else; if it is text, put it in""",
        ),
        ("text=1.10", """put it in quotes: 'text="1.10"'"""),
        ("name=my run", "name='my run': take letters, digits and . _ - (64 at most, first a letter or digit)"),
        ("texts=[a, 1]", "texts.1=1: give text, in quotes as YAML takes it for something else"),
        ("texts=a", "texts='a': give a list, as [a, b]"),
        ("layers=-1", "layers=-1: give text or a list, as [a, b]"),
        ("whole=true", "whole=True: true and false are no value here"),
        ("number=false", "number=False: true and false are no value here"),
        ("layers=[1, true]", "true and false are no value here"),
        ("whole=1:30", "whole='1:30': give a whole number"),
        ("whole=1.5", "whole=1.5: give a whole number"),
        ("number=x", "number='x': give a number"),
        ("number=1e999", "number=inf: Input should be a finite number"),
        ("number=1e300", "number=1e+300 is more than float32 holds"),
        ("flag=2", "flag=2: give true or false"),
        (f"whole={10**100}", "whole is a number of 333 bits: give one below 2^63"),
        (f"anything.a=[{-(2**63)}]", "anything.a.0 is a number of 64 bits"),
        ("whole=" + "9" * 5000, "holds a number of 5000 digits"),
        ('text="a\\0b"', "text='a\\x00b' holds half a character, or none (NUL)"),
        ("text=\udcff", "holds half a character"),
        ("table.x.rate=fast", "table.x.rate='fast': give a number"),
        ("table.x.rat=1", "unknown key 'table.x.rat' (did you mean 'rate'?)"),
        ("inner.rate=fast", "inner.rate='fast': give a number"),
        ("inner=3", "inner=3: give a mapping, as {key: value}"),
    ],
)
def test_a_value_on_the_command_line_is_taken_whole_or_the_error_says_how_to_write_it(assignment, said):
    with pytest.raises(ConfigError) as error:
        given(assignment)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_values_on_the_command_line():
    found = given("texts=[yes, no]", "whole=010", 'text="Question: {prompt} #1"', "number=1e-5", "layers=[1, 2]", "flag=on")
    assert found == Fields(
        texts=("yes", "no"), whole=10, text="Question: {prompt} #1", number=1e-5, layers=(1, 2), flag=True
    )
    assert given("text='1.10'", "anything=true", "number=null", 'name="1.10"').name == "1.10"
