"""A run as one HTML file that needs nothing else: RUN/report.html, made of what is logged, or of what `report` scored."""

import base64
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from mitrain.core.errors import MissingExtraError
from mitrain.core.files import remedy, write_atomic
from mitrain.core.provenance import made_with
from mitrain.data.figures import Panel
from mitrain.training import curves, listing

log = logging.getLogger(__name__)

SIDE = 240  # pixels of a sample's picture
NAME = "report.html"


def write_page(folder: Path) -> None:
    """Write RUN/report.html and RUN/curves.svg of what the run has logged."""
    html, svg = page(folder)
    try:
        write_atomic(folder / NAME, html)
        if svg:
            write_atomic(folder / "curves.svg", svg)
    except OSError as error:  # the run itself is whole
        log.warning("cannot write %s (%s): %s and make it again: mitrain report", folder / NAME, error, remedy(error))


def page(folder: Path, scored: Sequence[str] = ()) -> tuple[str, str]:
    """The page, and the curves in it as SVG, if matplotlib is there; ``scored``: sections about what was scored since."""
    run, svg = listing.described(folder), ""
    metric = run["metric"] or "loss"
    try:
        svg = curves.drawn(folder, metric)
    except MissingExtraError as error:
        log.warning("%s has no curves: %s", NAME, error)
    made = made_with(("mitrain", "torch", "transformers"))
    inline = svg[svg.index("<svg") :] if svg else ""  # without its XML head, which has no place inside of HTML
    values = {
        "title": escape(folder.absolute().name),
        "subtitle": escape(f"{run['task']} with {run['method']}, {run['state']}"),
        "facts": facts(run, metric),
        "sections": "\n".join(filter(None, [section("Training", inline), *(scored or [of_val(folder)])])),
        "configuration": escape((folder / "config.yaml").read_text("utf-8")),
        "footer": escape(", ".join(f"{name} {value}" for name, value in (made.pop("versions") | made).items())),
    }
    template = Template(resources.files("mitrain.inference").joinpath("report.html").read_text("utf-8"))
    return template.substitute(values), svg


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def facts(run: Mapping[str, Any], metric: str) -> str:
    shown = {
        f"best {metric} on val": run["best"],
        "at step": run["at"],
        "steps": run["steps"],
        "language model": Path(str(run["config"].get("model", {}).get("llm"))).name,
        "last changed": run["changed"],
    }
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(number(v))}</dd></div>" for k, v in shown.items())


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def of_val(folder: Path) -> str:
    """The evaluations that training made."""
    lines = [line for line in curves.logged(folder) if line.get("kind") == "val"]
    names = [n for n, v in lines[-1].items() if isinstance(v, int | float) and n not in ("step", "time")] if lines else []
    rows = [[str(line["step"]), *(number(line.get(name)) for name in names)] for line in lines]
    more = f"mitrain report {folder} adds a test split, negative controls, classes and samples."
    note = f'<p class="soft">{escape(more)}</p>'
    return section("Val during training", table(["step", *names], rows) + note) if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], own: Collection[int] = ()) -> str:
    """``own``: the rows that the others are read beside."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = [f"<tr{' class=own' if i in own else ''}>{''.join(map(cell, row))}</tr>" for i, row in enumerate(rows)]
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def cell(text: str) -> str:
    return f"<td{' class=text' if any(map(str.isalpha, text)) else ''}>{escape(text)}</td>"


def of_classes(details: Mapping[str, Any], split: str) -> list[str]:
    """Sections for the scores of each class and for the confusion, where there are any."""
    classes, confusion = details.get("per_class", {}), details.get("confusion")
    rows = [[name, *map(number, row.values())] for name, row in classes.items()]
    head = ["class", "precision", "recall", "F1", "samples"]
    parts = [section(f"{split}, class by class", table(head, rows))] if rows else []
    return parts + ([section(f"{split}: which class is taken for which", matrix(**confusion))] if confusion else [])


def matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Rows are the truth; a cell is the darker the more of its row it holds."""
    top = "".join(f"<th>{escape(name)}</th>" for name in classes)
    rows = []
    for name, row in zip(classes, counts, strict=True):
        total = max(1, sum(row))
        cells = "".join(f'<td style="background: rgb(36 87 197 / {0.7 * n / total:.2f})">{n or ""}</td>' for n in row)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    head = f"<thead><tr><th>truth \\ said</th>{top}</tr></thead>"
    return f'<table class="confusion">{head}<tbody>{"".join(rows)}</tbody></table>'


def sheet(panels: Sequence[Panel]) -> str:
    shown = []
    for panel in panels:
        kind = {True: "right", False: "wrong", None: ""}[panel.right]
        lines = "".join(f"<div>{escape(line)}</div>" for line in panel.lines)
        picture = f'<img alt="" src="{data_uri(panel.picture)}">'
        shown.append(f'<figure class="{kind}">{picture}<figcaption>{lines}</figcaption></figure>')
    return f'<div class="sheet">{"".join(shown)}</div>' if shown else ""


def data_uri(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    with BytesIO() as buffer:
        small.save(buffer, format="JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
