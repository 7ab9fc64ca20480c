"""Tables and figures from CSV files alone: ``python kernels/bench --report``.

Beside ``<name>.csv`` come ``<name>.md`` and ``<name>.svg``; a table that docs/guide/kernels.md shows is replaced there.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.cases import shape_text
from bench.results import read_csv
from bench.rounds import say

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guide" / "kernels.md"
INKS = {
    "plain": "#888888",
    "eager": "#c0392b",
    "reference": "#8e6bbf",
    "compile": "#d68910",
    "sdpa": "#1f6fb2",
    "torch": "#1f6fb2",
    "flash": "#17a589",
    "flex": "#7d6608",
    "triton": "#1e8449",
}
WIDTH, HEIGHT, LEFT, TOP = 300, 240, 48, 44
Rows = Sequence[dict[str, Any]]


def write_reports(folder: Path) -> int:
    """A table and a figure for every CSV file in the folder; 2 if there is none."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        say(f"no CSV files in {folder}: measure first")
        return 2
    for path in paths:
        found = read_csv(path)
        path.with_suffix(".md").write_text(document(found), encoding="utf-8")
        path.with_suffix(".svg").write_text(figure(found), encoding="utf-8")
        say(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.svg').name}")
        into_page(path.with_suffix(".md"), PAGE, ROOT)
    return 0


def into_page(path: Path, page: Path, root: Path) -> None:
    """Replace the table that ``page`` shows of this file, which it names by its path from ``root``, if it shows it."""
    if not path.resolve().is_relative_to(root):
        return
    mark = f"<!-- results: {path.resolve().relative_to(root).as_posix()} -->\n"
    text = page.read_text(encoding="utf-8")
    if mark in text:
        before, after = text.split(mark, 1)
        rest = after[after.index("<!-- end -->") :]
        page.write_text(before + mark + path.read_text(encoding="utf-8") + rest, encoding="utf-8")


def document(found: Rows) -> str:
    one = found[0]
    made = f"on {one['date']}, commit {one['commit']}, {one['versions']}, {one['device']}, {one['dtype']}"
    quantity = f"median of {one['samples']} samples from {one['rounds']} fresh processes"
    return f"{table(found)}\n\nMade by `{command(found)}` {made}; {quantity}.\n"


def command(found: Rows) -> str:
    """The command that measures these rows again."""
    one, providers = found[0], dict.fromkeys(row["provider"] for row in found)
    rounds = int(one["rounds"])
    each = int(one["samples"]) // rounds
    options = f"--providers {','.join(providers)} --rounds {rounds} --samples {each}"
    return f"python kernels/bench --op {one['op']} {options}"


def table(found: Rows) -> str:
    """One line per case and provider; × is relative to the baseline ``plain``, in the same rounds."""
    lines = [
        "| shape | provider | forward ms | × | forward + backward ms | × | saved for backward | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, modes in by_line(found).items():
        forward, both = modes["forward"], modes.get("both")
        cells = [key[0], key[1], *time_cells(forward), *time_cells(both), saved_cell(forward)]
        lines.append(f"| {' | '.join(cells)} | {(both or forward)['peak_bytes'] / 2**20:.1f} |")
    return "\n".join(lines)


def by_line(found: Rows) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """{(case, provider): {mode: row}} in the order of the rows."""
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in found:
        where = f"{shape_text(row['shape'])} {row['variant']}".strip()
        lines.setdefault((where, row["provider"]), {})[row["mode"]] = row
    return lines


def time_cells(row: dict[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "–", "–"
    spread = f"{row['median_ms']:.3g} ({row['q20_ms']:.3g}–{row['q80_ms']:.3g})"
    return spread, "–" if row["ratio_to_plain"] is None else f"{row['ratio_to_plain']:.2f}"


def saved_cell(row: dict[str, Any]) -> str:
    ratio = "" if row["saved_to_plain"] is None else f" (× {row['saved_to_plain']:.2f})"
    return f"{row['saved_bytes'] / 2**20:.1f} MiB{ratio}"


def figure(found: Rows, mode: str = "both") -> str:
    """SVG: ratio to the baseline against T, one panel per layout of heads, both axes logarithmic."""
    kept = [row for row in found if row["mode"] == mode and row["ratio_to_plain"] is not None and not row["variant"]]
    layouts: dict[str, list[dict[str, Any]]] = {}
    for row in kept:
        layouts.setdefault(shape_text({k: v for k, v in row["shape"].items() if k != "T"}), []).append(row)
    top = 1.15 * max((row["ratio_to_plain"] for row in kept), default=2.0)
    panels = [panel(name, rows, i * (WIDTH + 20), top) for i, (name, rows) in enumerate(layouts.items())]
    names = list(dict.fromkeys(row["provider"] for row in kept))
    width, height = len(layouts) * (WIDTH + 20), HEIGHT + 40
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            write(LEFT, 16, "forward + backward, time ÷ time of the plain operator, against T", size=12),
            *panels,
            *legend(names),
            "</svg>\n",
        ]
    )


def panel(name: str, rows: Rows, left: float, top: float) -> str:
    """One set of axes with a line per provider."""
    lengths = sorted({row["shape"]["T"] for row in rows})
    low = min(0.9, *(0.95 * row["ratio_to_plain"] for row in rows))
    x = lambda T: left + LEFT + place(T, lengths[0], lengths[-1]) * (WIDTH - LEFT - 20)  # noqa: E731
    y = lambda ratio: HEIGHT - 24 - place(ratio, low, top) * (HEIGHT - 24 - TOP)  # noqa: E731
    parts = [write(left + LEFT, 34, name)]
    for tick in (r for r in (0.5, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= r <= top):
        ink = "#444" if tick == 1 else "#ddd"
        parts.append(line([(left + LEFT, y(tick)), (left + WIDTH, y(tick))], ink, 1))
        parts.append(write(left + LEFT - 5, y(tick) + 4, f"{tick:g}×", anchor="end"))
    parts += [write(x(T), HEIGHT - 6, str(T), anchor="middle") for T in lengths]
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((x(r["shape"]["T"]), y(r["ratio_to_plain"])) for r in rows if r["provider"] == provider)
        parts.append(line(points, ink_of(provider), 2))
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{ink_of(provider)}"/>' for a, b in points]
    return "\n".join(parts)


def place(value: float, low: float, high: float) -> float:
    """Where the value lies between low (0) and high (1) on a logarithmic axis."""
    return 0.5 if high == low else math.log(value / low) / math.log(high / low)


def legend(names: Sequence[str]) -> list[str]:
    parts = []
    for i, name in enumerate(names):
        x = LEFT + i * 78
        parts += [line([(x, HEIGHT + 22), (x + 16, HEIGHT + 22)], ink_of(name), 3), write(x + 20, HEIGHT + 26, name)]
    return parts


def line(points: Sequence[tuple[float, float]], ink: str, width: int) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="{width}"/>'


def write(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def ink_of(provider: str) -> str:
    return INKS.get(provider, "#222222")
