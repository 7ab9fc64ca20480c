"""What a run logged, drawn: the loss of its steps and the score on val, from metrics.jsonl."""

import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mitrain.core.errors import need_extra

# Letters stay text, names are no formulas, and the same numbers give the same file.
STYLE = {"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "mitrain", "font.size": 9}
MOST_POINTS = 400
SMOOTH = 0.05  # of the run, over which the smoothed loss is a mean


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but those that are torn; none where there is no such file."""
    found: list[dict[str, Any]] = []
    with suppress(OSError, UnicodeDecodeError):
        for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
                found += [value] if isinstance(value, dict) else []
    return found


def series(lines: Sequence[dict[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of every line of a ``kind`` that has the number."""
    found = [(line["step"], line.get(name)) for line in lines if line.get("kind") == kind]
    return [(step, value) for step, value in found if isinstance(value, int | float)]


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over consecutive stretches, `MOST_POINTS` of them at most."""
    size = max(1, -(-len(points) // MOST_POINTS), round(SMOOTH * len(points)) if len(points) > 40 else 1)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def drawn(folder: Path, metric: str) -> str:
    """SVG: the loss of the steps, and ``metric`` on val, beside each other. MissingExtraError without matplotlib."""
    matplotlib = need_extra("matplotlib", "plots", "drawing a run's curves")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = logged(folder)
    losses = series(lines, "train", "loss")
    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        loss, score = figure.subplots(1, 2)
        loss.plot(*columns(losses[:: max(1, len(losses) // MOST_POINTS)]), color="C0", alpha=0.3, linewidth=0.8)
        loss.plot(*columns(smoothed(losses)), color="C0")
        score.plot(*columns(series(lines, "val", metric)), color="C0", marker="o")
        for axes, title in ((loss, "loss of the training steps"), (score, f"{metric} on val")):
            axes.set(title=title, xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()
