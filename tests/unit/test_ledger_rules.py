"""The language of rules: what each function gives, what is refused, and what is missing."""

import math

import pytest

from mitrain.compare import rules
from mitrain.compare.rules import Missing, Rows
from mitrain.core.errors import ConfigError


def row(method, seed=0, value=0.5, axis=None, at=None, task="t", status="ok", **more):
    place = {"task": task, "method": method, "axis": axis, "at": at, "seed": seed}
    return {**place, "status": status, "reason": None, "value": value, **more}


ROWS = [
    row("a", 0, 0.6, controls={"no-image": 0.2}), row("a", 1, 0.8, controls={"no-image": 0.4}), row("a", 2, 0.7),
    row("b", 0, 0.5), row("b", 1, 0.9), row("b", 2, 0.4),
    *[row("m", seed, 0.1 * k + 0.01 * seed, "experts", k) for k in (1, 2, 4) for seed in (0, 1)],
    row("lost", 0, 0.5), row("lost", 1, None, status="too long"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('mean("value", method="a")', 0.7),
        ('mean("value", method="a", seed=1)', 0.8),
        ('spread("value", method="a")', 0.1),
        ('least("value", method="b")', 0.4),
        ('most("value", method="b")', 0.9),
        ('mean("value", method="m", experts=4)', 0.405),
        ('series("value", over="experts", method="m")', [0.105, 0.205, 0.405]),
        ('points(over="experts", method="m")', [1, 2, 4]),
        ('slope(points(over="experts", method="m"), series("value", over="experts", method="m"))', 0.1),
        ("fit([1, 2, 3], [1, 2, 3])", 1.0),
        ("fit([1, 2, 3], [1, 3, 2])", 0.25),
        ("rises([1, 2, 3])", True),
        ("rises([1, 3, 2])", False),
        ("rises([1, 3, 2.95, 4], 0.1)", True),
        ("rises([1, 3, 2.5, 4], 0.1)", False),
        ("falls([3, 2, 1])", True),
        ("falls([3, 3, 1])", False),
        ('wins("value", "a", "b")', 2 / 3),
        ('noise("value", "a", "b")', math.sqrt((0.01 + 0.07) / 3)),
        ("first([4, 5]) + last([4, 5]) * 2", 14),
        ("abs(-2) + min(1, 2) + max([3, 4]) + sum([1, 2]) + len([7])", 11),
        ("1 < 2 < 3 and not 2 > 3", True),
        ("1 < 2 < 2 or 1 == 2", False),
        ("-3 / 2 != 1", True),
        ("known * 2", 6),
    ],
)
def test_what_each_gives(text, expected):
    assert rules.value_of(text, ROWS, {"known": 3}) == pytest.approx(expected)


def test_a_number_within_a_field():
    rows = [r for r in ROWS if r.get("controls")]
    assert rules.value_of('mean("controls.no-image", method="a")', rows, {}) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mean('value', method='a'", "is no expression"),
        ("", "is no expression"),
        ("__import__('os').system('true')", "is no function of a rule"),
        ("mean.__class__", "has no place in a rule"),
        ("menu('value')", "did you mean 'mean'"),
        ("[x for x in (1, 2)]", "has no place in a rule"),
        ("lambda: 1", "has no place in a rule"),
        ("2 ** 9999999", "has no place in a rule"),
        ("(1).real", "has no place in a rule"),
        ("mean('value', **{})", "has no place in a rule"),
        ("1 if 2 else 3", "has no place in a rule"),
        ("f'{1}'", "has no place in a rule"),
        ("1 in [1]", "has no place in a rule"),
        ("None", "has no place in a rule"),
        ("-" * 200 + "1", "nested too deeply"),
        ("1 + " * 1000 + "1", "too long"),
    ],
)
def test_nothing_else_is_a_rule(text, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared
        rules.checked(text)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('mean("value", method="none")', "no row with method=none"),
        ('mean("value", method="m")', "no row with method=m"),
        ('mean("value", method="m", experts=8)', "no row with method=m, experts=8"),
        ('mean("speed", method="a")', "t a seed 0: no number 'speed'"),
        ('mean("value", method="lost")', "t lost seed 1: too long"),
        ('spread("value", method="a", seed=1)', "one seed has no spread"),
        ('1 / (mean("value", method="a", seed=0) - 0.6)', "divides by zero"),
        ("rises([1])", "two points"),
        ("slope([1, 1], [1, 2])", "two points"),
        ('wins("value", "a", "lost")', "too long"),
    ],
)
def test_what_is_missing_is_said(text, words):
    with pytest.raises(Missing) as error:
        rules.value_of(text, ROWS, {})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('mean("value")', "rows of several methods (a, b, lost): add method="),
        ('mean("value", method="m", experts=1, length=2)', "rows lie on one axis"),
        ('mean("value", methd="a")', "'methd' is no axis of the study"),
        ('series("value", over="expert", method="m")', "'expert' is no axis of the study (did you mean 'experts'?)"),
        ("1 + 'a'", "cannot be computed"),
        ("first([])", "cannot be computed"),
        ("slope([1, 2], [1])", "do not pair"),
        ("mean()", "cannot be computed"),
        ("1 < 'a'", "cannot be computed"),
    ],
)
def test_what_makes_no_sense_is_one_line(text, words):
    with pytest.raises(ConfigError) as error:
        rules.value_of(text, ROWS, {})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_rows_remember_which_were_read():
    rows = Rows(ROWS)
    rules.value_of('mean("value", method="b") + mean("value", method="b", seed=0)', rows, {})
    assert [(r["method"], r["seed"]) for r in rows.read] == [("b", 0), ("b", 1), ("b", 2)]


def test_quantities_are_found():
    assert rules.names("gain > 2 * noise('value', 'a', 'b') and other") == ["gain", "other"]
