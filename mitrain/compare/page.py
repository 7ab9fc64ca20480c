"""One HTML file that needs nothing beside it: the figures of a study, and what its methods say of the same pictures."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mitrain.compare.table import good, groups, over_seeds, provenance

Row = dict[str, Any]
BASE64 = re.compile(r"[A-Za-z0-9+/=]*")
STYLE = """
body { font: 14px/1.4 sans-serif; margin: 1.5em; color: #222; }
table { border-collapse: collapse; } td, th { border: 1px solid #ddd; padding: .4em .6em; vertical-align: top; }
th { text-align: left; background: #f6f6f6; } td p { margin: 0 0 .2em; max-width: 16em; }
.right { background: #eef8ef; } .wrong { background: #fbeeee; } .sheet { overflow-x: auto; }
"""


def page(result: dict[str, Any], predictions: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """HTML of the ``predictions`` ({cell: task, method, panels}) below the ``figures`` ({name: SVG})."""
    title = escape(result["title"] or result["study"])
    parts = [f"<h1>{title}</h1>", f"<p>{escape(provenance(result['made']))}</p>"]
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for cell in predictions.values():
        by_task.setdefault(cell["task"], []).append(cell)
    parts += figures.values()
    for task, cells in by_task.items():
        order = list(dict.fromkeys(row["method"] for row in result["rows"] if row["task"] == task))
        known = sorted((c for c in cells if c["method"] in order), key=lambda c: order.index(c["method"]))
        if known:
            parts += [f"<h2>{escape(task)}</h2>", sheet(known, values_of(result["rows"], task))]
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return "\n".join([f"{head}</head><body>", *parts, "</body></html>\n"])


def values_of(rows: Sequence[Row], task: str) -> dict[str, str]:
    """What stands below a method's name: its metric over the seeds."""
    own = [row for row in rows if row["task"] == task and row["axis"] is None]
    return {
        group[0]["method"]: f"{found[0]['metric']} {over_seeds(found, 'value', 3)}"
        for group in groups(own)
        if (found := good(group))
    }


def sheet(cells: Sequence[Mapping[str, Any]], values: Mapping[str, str]) -> str:
    """A row per picture, a column per method."""
    head = "".join(f"<th>{escape(c['method'])}<br>{escape(values.get(c['method'], ''))}</th>" for c in cells)
    samples = dict.fromkeys(panel["sample"] for cell in cells for panel in cell["panels"])
    lines = []
    for sample in samples:
        found = [next((p for p in cell["panels"] if p["sample"] == sample), None) for cell in cells]
        pictures = [panel["picture"] for panel in found if panel]
        shared = len(set(pictures)) == 1
        first = image(pictures[0]) if shared else ""
        lines.append(f"<tr><td>{first}</td>{''.join(said(panel, not shared) for panel in found)}</tr>")
    return f'<div class="sheet"><table><tr><th></th>{head}</tr>\n' + "\n".join(lines) + "</table></div>"


def said(panel: Mapping[str, Any] | None, own_picture: bool) -> str:
    if panel is None:
        return "<td></td>"
    kind = {True: "right", False: "wrong"}.get(panel["right"], "")
    text = "".join(f"<p>{escape(str(line))}</p>" for line in panel["lines"])
    return f'<td class="{kind}">{image(panel["picture"]) if own_picture else ""}{text}</td>'


def image(encoded: str) -> str:
    """A JPEG in base64, which cannot hold anything else."""
    if not isinstance(encoded, str) or not BASE64.fullmatch(encoded):
        return ""
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
