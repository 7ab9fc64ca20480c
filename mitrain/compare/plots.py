"""The figures of a study, from its rows: quality against what it costs, and curves along the axes. Drawn by matplotlib."""

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mitrain.compare.table import good, groups
from mitrain.core.errors import need_extra
from mitrain.training.curves import STYLE

Row = dict[str, Any]
COSTS = {
    "trainable_parameters": ("parameters", "trainable parameters", 1),
    "peak_bytes": ("memory", "peak memory, MiB", 2**20),
    "step_ms": ("time", "training step, ms", 1),
}


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
    figures = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        metric = own[0]["metric"]
        for key, (name, title, unit) in COSTS.items():
            lines = against(own, key, unit)
            if lines:
                figures[f"{task}-{name}"] = figure(f"{task}: {metric} against {title}", title, metric, lines, "log")
        for axis in dict.fromkeys(row["axis"] for row in own if row["axis"]):
            figures |= curves(task, axis, [row for row in own if row["axis"] == axis], metric)
    return figures


def against(rows: Sequence[Row], key: str, unit: float) -> list[Line]:
    """A point per method at no axis."""
    lines = []
    for group in groups(row for row in rows if row["axis"] is None):
        costs = [row[key] for row in group if row.get(key)]
        if costs:
            point = (statistics.fmean(costs) / unit, *centre(row["value"] for row in group))
            lines.append(Line(group[0]["method"], [point]))
    return lines


def curves(task: str, axis: str, rows: Sequence[Row], metric: str) -> dict[str, str]:
    """Quality, and what a training step saves, along an axis of numbers."""
    rows = [row for row in rows if isinstance(row["at"], int | float) and not isinstance(row["at"], bool)]
    figures = {}
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
            figures[f"{task}-{axis}{suffix}"] = figure(f"{task}: {title} along {axis}", axis, title, drawn, "linear")
    return figures


def centre(values: Iterable[float]) -> tuple[float, float]:
    numbers = list(values)
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def figure(title: str, across: str, up: str, lines: Sequence[Line], scale: str) -> str:
    """One set of axes; a line through each method's points, whose whiskers are the spread over the seeds."""
    matplotlib = need_extra("matplotlib", "plots", "drawing figures")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        drawn = Figure(figsize=(6.5, 3.6), layout="constrained")
        axes = drawn.subplots()
        for number, line in enumerate(lines):
            x, y, spread = zip(*line.points, strict=True)
            marker = "os^D"[number // 10 % 4]  # colours repeat after ten
            axes.errorbar(x, y, yerr=spread if any(spread) else None, marker=marker, label=line.name)
        axes.set(title=title, xlabel=across, ylabel=up, xscale=scale)
        if scale == "log":  # 100, 2k, 5M in place of powers, which are formulas; few of them
            xs = [x for line in lines for x, *_ in line.points]
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(xs) < 300 * min(xs) else (1,)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        drawn.legend(loc="outside right upper")
        drawn.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def memory_bar(title: str, parts: Mapping[str, int], limit: int) -> str:
    """Bytes by part beside one another in one bar, and how much there is."""
    matplotlib = need_extra("matplotlib", "plots", "drawing figures")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        drawn = Figure(figsize=(7.5, 2.6), layout="constrained")
        axes, start = drawn.subplots(), 0.0
        for name, size in parts.items():
            axes.barh([""], [size / 2**30], left=[start], label=f"{name} ({size / 2**30:.2f})")
            start += size / 2**30
        axes.axvline(limit / 2**30, color="black", linestyle="--", label=f"memory ({limit / 2**30:.2f})")
        axes.set(title=f"{title}: GiB of a rank", xlabel="GiB")
        drawn.legend(loc="outside right upper")
        drawn.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()
