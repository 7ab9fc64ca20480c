"""What comes from outside: read within bounds, or refused with a reason."""

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mitrain import parsing
from mitrain.backbones.stream import Weights
from mitrain.errors import ModelError
from mitrain.parsing import DEPTH, LINE, NODES, Unreadable, dump_yaml, parse_json, parse_yaml, read_bytes

TENFOLD = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TENFOLD, f"more than {NODES} values, with those that its aliases repeat"),
        ("- x\n" * (NODES + 1), f"more than {NODES} values"),
        ("x: &x [*x]", r"refers to \*x in line 1, which is not complete before it"),
        ("x: *y", r"refers to \*y in line 1"),
        ("[" * (DEPTH + 1), f"nests more than {DEPTH} levels deep"),
        ("- " * 5000 + "x", f"nests more than {DEPTH} levels deep"),
        (f"a: &a {'[' * 40}x{']' * 40}\nb: {'[' * 40}*a{']' * 40}", f"nests more than {DEPTH} levels deep"),
        ("a: 1\n2020: 1", "has the key 2020 in line 2, which is no text: put it in quotes"),
        ("? !!binary aGk=\n: 1", "has the tag 'tag:yaml.org,2002:binary' in line 1"),
        ("? [a]\n: 1", "the key of several values in line 1"),
        ("a: !!python/name:os.system", "has the tag"),
        ("a: 1\nb: 2\na: 3", r"has the key 'a' twice \(line 3\)"),
        ("a: &x 1\nb: {'<<': 1, c: *x, c: 2}", r"has the key 'c' twice"),
        (
            "a: &x {b: 1}\nc:\n  <<: *x",
            "has the merge key << in line 3, which YAML 1.2 no longer has: write the keys out",
        ),
        ("c: {? << : [1]}", "has the merge key << in line 1"),
        ("--- 1\n--- 2", "a second document in line 2"),
        ("a: " + "9" * 5000, "a number of 5000 digits in line 1"),
        ("a: \ud800", "half a character"),
        ("a: b: c", r"not valid YAML \(line 1: mapping values are not allowed"),
        ("x" * (parsing.YAML_BYTES + 1), "longer than"),
    ],
)
def test_yaml_beyond_its_bounds_is_refused(text, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_yaml(text)


def test_yaml_is_that_of_version_1_2():
    text = "[010, 0o10, 0x1F, 1:30, yes, No, on, 2020-01-01, 1e-5, 2., .5, true, ~, '1', !!str 1, 1_000, 08, +7]"
    values = [10, 8, 31, "1:30", "yes", "No", "on", "2020-01-01", 1e-5, 2.0, 0.5, True, None, "1", "1", "1_000", 8, 7]
    found = parse_yaml(text)
    assert found == values and [type(v) for v in found] == [type(v) for v in values]
    assert parse_yaml("[.inf, -.INF]") == [math.inf, -math.inf] and math.isnan(parse_yaml(".nan"))
    assert parse_yaml("'<<': <<") == {"<<": "<<"}
    assert parse_yaml("") is parse_yaml("# nothing") is None


def test_small_use_of_aliases_works():
    assert parse_yaml("a: &a {lr: 1e-3}\nb: [*a, *a]\nc: &k name\nd: {*k : 1}") == {
        "a": {"lr": 1e-3},
        "b": [{"lr": 1e-3}] * 2,
        "c": "name",
        "d": {"name": 1},
    }


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["08", "010", "0o7", "0x1f", "1e5", "1:30", "yes", "2020-01-01", ".inf", "-", "~", "null", "1_0", "+1", "=", "<<"]
)
VALUES = st.recursive(SCALARS | TEXTS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3))


@settings(deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_what_is_written_is_read_back(values):
    assert parse_yaml(dump_yaml(values)) == values


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("[]{}:,-&*!?|>'\"#ab1 \n", max_size=40))
def test_any_text_is_a_value_or_unreadable(text):
    for parse in (parse_yaml, parse_json):
        try:
            parse(text)
        except Unreadable as error:
            assert str(error)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, f"nests more than {DEPTH} levels deep"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"nests more than {DEPTH} levels deep"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        ('"\\ud800"', "surrogates not allowed"),
        ("9" * 5000, "not valid JSON"),
        ("{", "not valid JSON"),
    ],
)
def test_json_beyond_its_bounds_is_refused(text, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_json(text)
    with pytest.raises(Unreadable, match=reason):
        parse_json(text.encode())


def test_numbers_that_are_not_finite_are_refused_where_asked():
    for text in ("NaN", "-Infinity", "1e999"):
        assert not math.isfinite(parse_json(text))
        with pytest.raises(Unreadable, match="no JSON number"):
            parse_json(f"[{text}]", finite=True)
    assert parse_json("[1e3, 2]", finite=True) == [1000.0, 2]
    assert parse_json(json.dumps("😀").encode("utf-8-sig")) == "😀"


def test_only_regular_files_of_the_expected_length(tmp_path):
    file, pipe, link, sparse = (tmp_path / name for name in ("file", "pipe", "link", "sparse"))
    file.write_bytes(b"12345")
    os.mkfifo(pipe)
    link.symlink_to(file)
    with open(sparse, "wb") as handle:
        handle.truncate(20 << 30)
    assert read_bytes(file, 5) == read_bytes(link, 5) == b"12345"
    for path, reason in ((pipe, "not a plain file"), ("/dev/zero", "not a plain file"), (sparse, "longer than")):
        with pytest.raises(Unreadable, match=reason):
            read_bytes(path, 1 << 20)
    with pytest.raises(Unreadable, match="longer than the 4 bytes"):
        read_bytes(file, 4)
    with pytest.raises(Unreadable, match="longer than the 4 bytes"):
        read_bytes("/proc/self/status", 4)  # tells no size
    for path, follow, reason in ((tmp_path, True, "Is a directory"), (link, False, "symbolic links")):
        with pytest.raises(OSError, match=reason):
            read_bytes(path, 5, follow)


def test_a_line_without_end_is_refused(tmp_path):
    path = tmp_path / "long"
    path.write_text("a\n" + "b" * LINE + "\n")
    with open(path, encoding="utf-8") as file, pytest.raises(Unreadable, match=f"{LINE} characters in line 2"):
        list(parsing.lines_of(file))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 10_000])
def test_a_broken_index_of_weights_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json' is no index of weights"):
        Weights.of(tmp_path)
