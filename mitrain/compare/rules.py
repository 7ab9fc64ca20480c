"""Rules over result rows: small expressions, read as a syntax tree and computed here; nothing is ever evaluated as Python.

    mean("value", method="mit", task="classify")     over the seeds; spread, least and most likewise
    series("value", over="experts", method="mope")   the means along an axis, in the study's order
    points(over="experts", method="mope")            the axis' values
    slope(x, y)   fit(x, y)                          the least-squares line through points: its slope, its R²
    rises(y)   falls(y)                              from each point to the next; rises(y, 0.01) lets it dip by 0.01
    wins("value", "mit", "none", task="classify")    the share of seeds in which the first method has more
    noise("value", "mit", "none", task="classify")   standard error of the difference of the two means over the seeds
    first(y)   last(y)   abs   min   max   sum   len    and + − * / < <= > >= == != and or not, numbers, texts, lists

The other words of a call choose rows: by method, task, seed, or a point of an axis (``experts=4``); without the latter
the rows of no axis are meant. A row that is missing, failed or has no such number makes the claim open (`Missing`).
"""

import ast
import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mitrain.core.config import nearest
from mitrain.core.errors import ConfigError

Row = Mapping[str, Any]
LONGEST, DEEPEST = 2000, 40
BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
COMPARE = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
UNARY = {ast.USub: operator.neg, ast.Not: operator.not_}


class Rows(list):
    """Result rows that remember which of them rules have ``read``."""

    def __init__(self, rows: Sequence[Row] = ()):
        super().__init__(rows)
        self.read: list[Row] = []


class Missing(Exception):
    """What a rule needs is not among the rows; the message says what."""


def checked(text: str) -> str:
    """``text``, if it is an expression of this language; ValueError says what is not."""
    tree(text)
    return text


def tree(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise ValueError(f"a rule of {len(text)} characters is too long: {LONGEST} are allowed")
    try:
        found = ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(
            f"{text[:60]!r} is no expression: write for example mean('value', method='mit') > 0.5"
        ) from None
    check(found)
    return found


def check(node: ast.AST, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError("the rule is nested too deeply: name its parts as quantities")
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
        if name not in FUNCTIONS:
            raise ValueError(
                f"{name!r} is no function of a rule{nearest(name, FUNCTIONS)}: there are {known_functions()}"
            )
        inner: list[ast.AST] = [*node.args, *(word.value for word in node.keywords)]
        if any(word.arg is None for word in node.keywords):
            raise ValueError("** has no place in a rule: write the words out")
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        inner = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        inner = [node.operand]
    elif isinstance(node, ast.BoolOp):
        inner = list(node.values)
    elif isinstance(node, ast.Compare) and all(type(op) in COMPARE for op in node.ops):
        inner = [node.left, *node.comparators]
    elif isinstance(node, ast.List | ast.Tuple):
        inner = list(node.elts)
    elif isinstance(node, ast.Name) or (
        isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str)
    ):
        inner = []
    else:
        raise ValueError(
            f"{ast.unparse(node)[:60]!r} has no place in a rule: see mitrain/compare/rules.py for what has"
        )
    for child in inner:
        check(child, depth + 1)


def known_functions() -> str:
    return ", ".join(sorted(FUNCTIONS))


def names(text: str) -> list[str]:
    """The quantities that a rule speaks of."""
    found = tree(text)
    called = {id(node.func) for node in ast.walk(found) if isinstance(node, ast.Call)}
    words = [node for node in ast.walk(found) if isinstance(node, ast.Name) and id(node) not in called]
    return [node.id for node in sorted(words, key=lambda node: node.col_offset)]


def value_of(text: str, rows: Sequence[Row], known: Mapping[str, Any]) -> Any:
    """What the rule ``text`` gives on ``rows``; ``known``: the quantities before it, or what they lacked (Missing).

    Missing where rows lack that it needs; ConfigError where the rule asks for something senseless.
    """
    try:
        return compute(tree(text), rows, known)
    except ZeroDivisionError:
        raise Missing(f"{text!r} divides by zero") from None
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise ConfigError(f"the rule {text!r} cannot be computed ({error}): correct it") from None


def compute(node: ast.AST, rows: Sequence[Row], known: Mapping[str, Any]) -> Any:
    def inner(child: ast.AST) -> Any:
        return compute(child, rows, known)

    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if isinstance(known[node.id], Missing):
            raise known[node.id]
        return known[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [inner(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp):
        return UNARY[type(node.op)](inner(node.operand))
    if isinstance(node, ast.BinOp):
        return BINARY[type(node.op)](inner(node.left), inner(node.right))
    if isinstance(node, ast.BoolOp):
        return decided(isinstance(node.op, ast.Or), [partial(inner, item) for item in node.values])
    if isinstance(node, ast.Compare):
        sides = [inner(node.left), *map(inner, node.comparators)]
        return all(COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))
    function, takes_rows = FUNCTIONS[node.func.id]
    given = [inner(item) for item in node.args]
    words = {word.arg: inner(word.value) for word in node.keywords}
    return function(rows, *given, **words) if takes_rows else function(*given, **words)


def decided(decisive: bool, parts: Sequence[Callable[[], Any]]) -> bool:
    """``or`` where True is ``decisive``, ``and`` where False is: one decisive part is enough, whatever rows others lack."""
    missing = None
    for part in parts:
        try:
            if bool(part()) is decisive:
                return decisive
        except Missing as error:
            missing = missing or error
    if missing:
        raise missing
    return not decisive


# What chooses rows


def chosen(rows: Sequence[Row], words: Mapping[str, Any], axis: str | None = None) -> list[Row]:
    """The rows that ``words`` name, of one task and method; with ``axis`` those of all its points."""
    fixed = {key: words[key] for key in ("method", "task", "seed") if key in words}
    points = {key: item for key, item in words.items() if key not in fixed}
    if len(points) + (axis is not None) > 1:
        raise ValueError(f"rows lie on one axis, and {', '.join([*points, axis or ''])} are several")
    known = {row["axis"] for row in rows} - {None}
    for name in filter(None, [*points, axis]):
        if rows and name not in known:
            raise ValueError(f"{name!r} is no axis of the study{nearest(name, known)}")
    found = [row for row in rows if all(row[key] == item for key, item in fixed.items())]
    if axis is not None:
        found = [row for row in found if row["axis"] == axis]
    elif points:
        (name, at), *_ = points.items()
        found = [row for row in found if row["axis"] == name and row["at"] == at]
    else:
        found = [row for row in found if row["axis"] is None]
    told = ", ".join(f"{key}={item}" for key, item in [*words.items(), *([("over", axis)] if axis else [])])
    if not found:
        raise Missing(f"no row with {told or 'no axis'}")
    for key in ("task", "method"):
        several = sorted({str(row[key]) for row in found})
        if len(several) > 1:
            raise ValueError(f"{told or 'this'} means rows of several {key}s ({', '.join(several[:4])}): add {key}=")
    if isinstance(rows, Rows):
        rows.read += [row for row in found if not any(row is known for known in rows.read)]
    return found


def number(row: Row, name: str) -> float:
    """The number ``name`` of a row: one of its fields, or a.b for one within a field."""
    where = " ".join(str(row[key]) for key in ("task", "method") if row.get(key))
    where += f" {row['axis']}={row['at']}" if row["axis"] else ""
    where += f" seed {row['seed']}" if row["seed"] is not None else ""
    if row["status"] != "ok":
        raise Missing(f"{where}: {row['status']}" + (f" ({row['reason']})" if row.get("reason") else ""))
    found: Any = row
    for part in name.split(".", 1):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise Missing(f"{where}: no number {name!r}")
    return float(found)


def numbers(rows: Sequence[Row], name: str, words: Mapping[str, Any]) -> list[float]:
    return [number(row, name) for row in chosen(rows, words)]


def mean(rows: Sequence[Row], name: str, **words: Any) -> float:
    return statistics.fmean(numbers(rows, name, words))


def spread(rows: Sequence[Row], name: str, **words: Any) -> float:
    """Standard deviation over the seeds."""
    return deviation(numbers(rows, name, words))


def deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        raise Missing("one seed has no spread")
    return statistics.stdev(values)


def least(rows: Sequence[Row], name: str, **words: Any) -> float:
    return min(numbers(rows, name, words))


def most(rows: Sequence[Row], name: str, **words: Any) -> float:
    return max(numbers(rows, name, words))


def along(rows: Sequence[Row], over: str, words: Mapping[str, Any]) -> dict[str, tuple[Any, list[Row]]]:
    """The rows of each point of an axis, in the order in which the points come."""
    groups: dict[str, tuple[Any, list[Row]]] = {}
    for row in chosen(rows, words, over):
        groups.setdefault(repr(row["at"]), (row["at"], []))[1].append(row)
    return groups


def series(rows: Sequence[Row], name: str, over: str, **words: Any) -> list[float]:
    return [statistics.fmean(number(r, name) for r in group) for _, group in along(rows, over, words).values()]


def points(rows: Sequence[Row], over: str, **words: Any) -> list[Any]:
    return [at for at, _ in along(rows, over, words).values()]


def paired(rows: Sequence[Row], name: str, one: str, other: str, words: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The numbers of two methods, seed by seed."""
    first = {row["seed"]: number(row, name) for row in chosen(rows, {**words, "method": one})}
    second = {row["seed"]: number(row, name) for row in chosen(rows, {**words, "method": other})}
    if first.keys() != second.keys():
        raise Missing(f"{one} and {other} have other seeds than one another")
    return [(first[seed], second[seed]) for seed in first]


def wins(rows: Sequence[Row], name: str, one: str, other: str, **words: Any) -> float:
    found = paired(rows, name, one, other, words)
    return sum(a > b for a, b in found) / len(found)


def noise(rows: Sequence[Row], name: str, one: str, other: str, **words: Any) -> float:
    """√(s₁²/n + s₂²/n): the standard error of a difference of means."""
    found = paired(rows, name, one, other, words)
    return math.sqrt(sum(deviation(side) ** 2 for side in zip(*found, strict=True)) / len(found))


# What computes with lists


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and R² of the least-squares line."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} points do not pair")
    if len(set(x)) < 2:
        raise Missing("a line needs two points")
    slope, start = statistics.linear_regression(x, y)
    total = sum((b - statistics.fmean(y)) ** 2 for b in y)
    rest = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, 1 - rest / total if total else 1.0


def steps(y: Sequence[float]) -> list[float]:
    if len(y) < 2:
        raise Missing("a trend needs two points")
    return [b - a for a, b in zip(y, y[1:], strict=False)]


def rises(y: Sequence[float], dip: float = 0.0) -> bool:
    return all(step > -dip if dip == 0 else step >= -dip for step in steps(y)) and y[-1] > y[0]


def falls(y: Sequence[float], bump: float = 0.0) -> bool:
    return rises([-value for value in y], bump)


FUNCTIONS: dict[str, tuple[Callable[..., Any], bool]] = {
    **{f.__name__: (f, True) for f in (mean, spread, least, most, series, points, wins, noise)},
    "slope": (lambda x, y: line(x, y)[0], False),
    "fit": (lambda x, y: line(x, y)[1], False),
    "rises": (rises, False),
    "falls": (falls, False),
    "first": (lambda y: y[0], False),
    "last": (lambda y: y[-1], False),
    **{f.__name__: (f, False) for f in (abs, min, max, sum, len)},
}
"""Name → function, and whether it is handed the rows."""
