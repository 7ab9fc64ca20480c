"""The figures of a study as SVG, from its rows: quality against what it costs, and curves along the axes."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mitrain.compare.table import good, groups

Row = dict[str, Any]
COSTS = {
    "trainable_parameters": ("parameters", "trainable parameters", 1),
    "peak_bytes": ("memory", "peak memory, MiB", 2**20),
    "step_ms": ("time", "training step, ms", 1),
}
INKS = ("#1f6fb2", "#c0392b", "#1e8449", "#8e6bbf", "#d68910", "#17a589", "#7d6608", "#5d6d7e", "#b03a6f", "#2e4053",
        "#6e9d2f", "#a04000")  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 320, 64, 36, 150, 44


@dataclass
class Line:
    """A method's points: x, mean and spread of y."""

    name: str
    points: list[tuple[float, float, float]] = field(default_factory=list)


def plots(result: dict[str, Any]) -> dict[str, str]:
    """Name → SVG. There is no figure where there is nothing to draw."""
    if result["kind"] == "count":
        return {}
    rows = [row for group in groups(result["rows"]) for row in good(group)]
    found = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        metric = own[0]["metric"]
        for key, (name, title, unit) in COSTS.items():
            lines = against(own, key, unit)
            if lines:
                found[f"{task}-{name}"] = figure(f"{task}: {metric} against {title}", title, metric, lines, True)
        for axis in dict.fromkeys(row["axis"] for row in own if row["axis"]):
            found |= curves(task, axis, [row for row in own if row["axis"] == axis], metric)
    return found


def against(rows: Sequence[Row], key: str, unit: float) -> list[Line]:
    """A point per method at no axis."""
    lines = []
    for group in groups(row for row in rows if row["axis"] is None):
        costs = [row[key] for row in group if row.get(key)]
        if costs:
            lines.append(
                Line(group[0]["method"], [(statistics.fmean(costs) / unit, *centre(r["value"] for r in group))])
            )
    return lines


def curves(task: str, axis: str, rows: Sequence[Row], metric: str) -> dict[str, str]:
    """Quality, and what a training step saves, along an axis of numbers."""
    rows = [row for row in rows if isinstance(row["at"], int | float) and not isinstance(row["at"], bool)]
    found = {}
    wanted = {"": ("value", metric, 1.0), "-saved": ("saved_bytes", "saved for backward, MiB", 2.0**20)}
    for suffix, (key, title, unit) in wanted.items():
        lines: dict[str, Line] = {}
        for group in groups(rows):
            values = [row[key] / unit for row in group if row.get(key) is not None]
            if values:
                line = lines.setdefault(group[0]["method"], Line(group[0]["method"]))
                line.points.append((float(group[0]["at"]), *centre(values)))
        if lines:
            drawn = [Line(line.name, sorted(line.points)) for line in lines.values()]
            found[f"{task}-{axis}{suffix}"] = figure(f"{task}: {title} along {axis}", axis, title, drawn, False)
    return found


def centre(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def figure(title: str, across: str, up: str, lines: Sequence[Line], logarithmic: bool) -> str:
    """One set of axes; a line through each method's points, whose whiskers are the spread over the seeds."""
    points = [point for line in lines for point in line.points]
    low, high = min(y - s for _, y, s in points), max(y + s for _, y, s in points)
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    bottom, top = low - room, high + room
    scale = math.log10 if logarithmic else float
    start, end = min(scale(x) for x, *_ in points), max(scale(x) for x, *_ in points)
    margin = 0.05 * ((end - start) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across_share = (scale(x) - start + margin) / (end - start + 2 * margin)
        return LEFT + across_share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (
            HEIGHT - BOTTOM - TOP
        )

    parts = [write(LEFT, 18, title, size=12), *frame(place, points, bottom, top, logarithmic)]
    parts += [write((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, across, "middle"), write(8, TOP - 6, up)]
    for number, line in enumerate(lines):
        ink, mark = INKS[number % len(INKS)], TOP + 8 + 15 * number
        places = [place(x, y) for x, y, _ in line.points]
        if len(places) > 1:
            parts.append(path(places, ink, 2))
        for (x, y, s), (a, b) in zip(line.points, places, strict=True):
            if s:
                parts.append(path([place(x, y - s), place(x, y + s)], ink, 1))
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{ink}"/>')
        parts.append(f'<circle cx="{WIDTH - RIGHT + 14}" cy="{mark - 4}" r="4" fill="{ink}"/>')
        parts.append(write(WIDTH - RIGHT + 24, mark, line.name))
    return document(parts, max(HEIGHT, TOP + 16 + 15 * len(lines)))


def frame(place: Any, points: Sequence[Any], bottom: float, top: float, logarithmic: bool) -> list[str]:
    """Grid lines and their numbers."""
    left, right = LEFT, WIDTH - RIGHT
    parts = []
    for tick in ticks(bottom, top):
        height = place(points[0][0], tick)[1]
        parts.append(path([(left, height), (right, height)], "#ddd", 1))
        parts.append(write(left - 5, height + 4, f"{tick:.4g}", "end"))
    xs = sorted({x for x, *_ in points})
    marks = powers(xs[0], xs[-1]) if logarithmic else xs
    for x in marks if len(marks) <= 12 else marks[:: -(-len(marks) // 12)]:
        parts.append(write(place(x, bottom)[0], HEIGHT - BOTTOM + 15, short(x), "middle"))
    parts.append(path([(left, TOP), (left, HEIGHT - BOTTOM), (right, HEIGHT - BOTTOM)], "#444", 1))
    return parts


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def powers(low: float, high: float) -> list[float]:
    """1, 2 or 5 times powers of ten between, or the ends where there are fewer than two."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = high / low > 300
    found = [f * 10.0**e for e in exponents for f in ((1,) if wide else (1, 2, 5)) if low <= f * 10.0**e <= high]
    return found if len(found) > 1 else sorted({low, high})


def short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def path(points: Sequence[tuple[float, float]], ink: str, width: float) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{text}" fill="none" stroke="{ink}" stroke-width="{width}"/>'


def write(x: float, y: float, words: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def document(parts: Sequence[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])
