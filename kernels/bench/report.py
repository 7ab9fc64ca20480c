"""Tables and figures from CSV files alone: ``python kernels/bench --report``.

Beside ``<name>.csv`` come ``<name>.md`` and ``<name>.svg``; a table that docs/guide/kernels.md shows is replaced there.
"""

import io
from collections.abc import Sequence
from importlib.util import find_spec
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
TICKS = (0.5, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
Rows = Sequence[dict[str, Any]]


def write_reports(folder: Path) -> int:
    """A table and a figure for every CSV file in the folder; 2 if there is none, or nothing to draw with."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        say(f"no CSV files in {folder}: measure first")
        return 2
    if find_spec("matplotlib") is None:
        say("figures are drawn by matplotlib, which is not installed: pip install matplotlib")
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
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    kept = [row for row in found if row["mode"] == mode and row["ratio_to_plain"] is not None and not row["variant"]]
    layouts: dict[str, list[dict[str, Any]]] = {}
    for row in kept:
        layouts.setdefault(shape_text({k: v for k, v in row["shape"].items() if k != "T"}), []).append(row)
    with matplotlib.rc_context({"svg.hashsalt": "mitrain", "svg.fonttype": "none", "font.size": 8}), io.StringIO() as file:
        drawn = Figure(figsize=(3.2 * max(1, len(layouts)), 3), layout="constrained")
        panels = drawn.subplots(1, max(1, len(layouts)), sharey=True, squeeze=False)[0]
        for axes, (name, rows) in zip(panels, layouts.items(), strict=False):
            for provider in dict.fromkeys(row["provider"] for row in rows):
                points = sorted((r["shape"]["T"], r["ratio_to_plain"]) for r in rows if r["provider"] == provider)
                axes.plot(*zip(*points, strict=True), "o-", color=INKS.get(provider), label=provider)
            axes.set(title=name, xscale="log", yscale="log", xlabel="T")
            axes.xaxis.set_major_locator(FixedLocator(sorted({row["shape"]["T"] for row in rows})))
            axes.yaxis.set_major_locator(FixedLocator(TICKS))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FormatStrFormatter("%g"))
            axes.grid(alpha=0.3)
        drawn.suptitle("forward + backward, time ÷ time of the plain operator, against T")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(INKS))
        drawn.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()
