"""The rows of a study as Markdown: a line per task, method and point, over the seeds."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from mitrain.compare.intervals import Estimate, outcomes_of
from mitrain.compare.study import same
from mitrain.core import markdown
from mitrain.core.markdown import plain
from mitrain.core.provenance import sentence

Row = dict[str, Any]
REDUCED = "†"
COUNTED = ("trainable_parameters", "frozen_parameters", "share", "backbone_parameters", "language_macs",
           "vision_macs", "method_macs", "prepended_macs")  # fmt: skip


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one task, method and point together, in the order in which they come."""
    grouped: list[list[Row]] = []
    for row in rows:
        for group in grouped:
            one = group[0]
            if all(one[key] == row[key] for key in ("task", "method", "axis")) and same(one["at"], row["at"]):
                group.append(row)
                break
        else:
            grouped.append([row])
    return grouped


def good(group: Sequence[Row]) -> list[Row]:
    return [row for row in group if row["status"] == "ok"]


def table(result: dict[str, Any]) -> str:
    """The whole document: lines, what the columns mean, how it was made."""
    rows = result["rows"]
    counted = result["kind"] == "count"
    lines = count_lines(rows) if counted else train_lines(rows, result.get("against"))
    notes = [] if counted else [meaning(rows, result.get("against"))]
    remarks = sorted({row["reduced"] for row in rows if row["reduced"]})
    notes += [f"{REDUCED} measured at reduced size: {'; '.join(remarks)}."] if remarks else []
    missing = result.get("missing", ())
    notes += [f"Not measured yet: {plain(', '.join(missing))}."] if missing else []
    found = search_lines(result["search"]) if result.get("search") else []
    return "\n".join([*lines, "", *notes, *([""] if notes else []), *found, sentence(result["made"]), ""])


def search_lines(found: Sequence[Row]) -> list[str]:
    head = ["task", "method", "chosen on val", "val", "trials", "steps in all", "minutes"]
    cells = [
        [*(plain(one[key]) for key in ("task", "method", "point")), f"{one['metric']} {one['value']:.3f}",
         str(one["trials"]), f"{one['steps']:,}", f"{one['seconds'] / 60:.0f}"]
        for one in found
    ]  # fmt: skip
    return [*markdown.table(head, cells), ""]


def meaning(rows: Sequence[Row], against: str | None) -> str:
    """What the columns are; rows of before outcomes were kept have no interval."""
    known = [bool(outcomes_of(good(group))) for group in groups(rows) if good(group)]
    said = [INTERVAL] if any(known) else []
    said += [f"Δ: of what is above {against}, likewise, sample by sample and seed by seed."] if against and said else []
    said += [] if known and all(known) else [SPREAD + (", where no sample's outcome was kept." if said else ".")]
    return " ".join([*said, MEANING])


INTERVAL = (
    "Value: mean [95 % interval], by bootstrap over test samples, those of an object or file drawn together, and seeds."
)
SPREAD = "Mean ± standard deviation over the seeds"
MEANING = (
    "Trainable: parameters, and their share of all. Peak: weights, gradients,"
    " optimizer state and what a training step saves for its backward pass, counted on tensors; of it saved. Step: median"
    " of the training steps. GFLOP: of a sample in a training step's forward pass (2 per multiply-accumulate), frozen parts"
    " that were computed before left out. Controls are scored with the same metric."
)


def train_lines(rows: Sequence[Row], against: str | None) -> list[str]:
    grouped = groups(rows)
    head = ["task", "method", "metric", "value", "controls", "trainable", "share", "peak MiB", "saved MiB", "step ms",
            "GFLOP/sample", "adapter MiB", "seeds"]  # fmt: skip
    head[4:4] = [f"Δ {plain(against)}"] if against else []
    beside = {group[0]["task"]: good(group) for group in grouped if is_plain(group[0], against)}
    other = [beside.get(group[0]["task"], []) if against else None for group in grouped]
    return markdown.table(head, [train_cells(*pair) for pair in zip(grouped, other, strict=True)])


def is_plain(row: Row, method: str | None) -> bool:
    return row["method"] == method and row["axis"] is None


def train_cells(group: Sequence[Row], other: Sequence[Row] | None) -> list[str]:
    """``other``: the rows that this one is shown the difference from, if the table has such a column."""
    measured, one = good(group), group[0]
    first = [plain(one["task"]), named(one)]
    lost = [row for row in group if row["status"] != "ok"]
    outcome = "; ".join(f"seed {row['seed']} {row['status']}: {row['reason']}" for row in lost)
    if not measured:
        lost_cells = [""] * (8 if other is None else 9)
        return [*first, plain(one["metric"] or ""), plain(outcome), *lost_cells, f"0 of {len(group)}"]
    return [
        *first,
        plain(measured[0]["metric"]),
        score(measured),
        *([] if other is None else [above(measured, other)]),
        controls(measured),
        count(measured, "trainable_parameters"),
        f"{100 * mean(measured, 'share'):.3g} %",
        mib(measured, "peak_bytes"),
        mib(measured, "saved_bytes"),
        over_seeds(measured, "step_ms", 0),
        "–" if mean(measured, "flops_per_sample") is None else f"{mean(measured, 'flops_per_sample') / 1e9:.3g}",
        mib(measured, "adapter_bytes"),
        f"{len(measured)}" + (f" of {len(group)} ({plain(outcome)})" if lost else ""),
    ]


def count_lines(rows: Sequence[Row]) -> list[str]:
    shown = [key for key in COUNTED if any(key in row for row in rows)]
    head = ["task", "method", *(key.replace("_", " ").replace("macs", "GMAC") for key in shown)]
    lost = [""] * (len(shown) - 1)
    cells = [
        [counted(key, row.get(key)) for key in shown] if row["status"] == "ok" else [plain(row["reason"]), *lost]
        for row in rows
    ]
    return markdown.table(head, [[plain(row["task"]), named(row), *own] for row, own in zip(rows, cells, strict=True)])


def counted(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key == "share":
        return f"{100 * value:.3g} %"
    return f"{value / 1e9:,.1f}" if key.endswith("macs") else f"{value:,.0f}"


def named(row: Row) -> str:
    point = f", {row['axis']} {row['at']}" if row["axis"] else ""
    return plain(f"{row['method']}{point}") + (f" {REDUCED}" if row["reduced"] else "")


def numbers(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def mean(rows: Sequence[Row], key: str) -> float | None:
    values = numbers(rows, key)
    return statistics.fmean(values) if values else None


def over_seeds(rows: Sequence[Row], key: str, digits: int) -> str:
    values = numbers(rows, key)
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def score(rows: Sequence[Row]) -> str:
    outcomes = outcomes_of(rows)
    return over_seeds(rows, "value", 3) if outcomes is None else spanned(outcomes.estimate)


def above(rows: Sequence[Row], other: Sequence[Row]) -> str:
    one, two = outcomes_of(rows), outcomes_of(other)
    gain = one - two if one and two and rows[0]["metric"] == other[0]["metric"] else None
    return "–" if gain is None or is_plain(rows[0], other[0]["method"]) else spanned(gain.estimate, "+")


def spanned(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def count(rows: Sequence[Row], key: str) -> str:
    value = mean(rows, key)
    return "–" if value is None else f"{value:,.0f}"


def mib(rows: Sequence[Row], key: str) -> str:
    value = mean(rows, key)
    return "–" if value is None else f"{value / 2**20:,.1f}"


def controls(rows: Sequence[Row]) -> str:
    scores = {name: [row["controls"].get(name) for row in rows] for name in rows[0]["controls"]}
    known = {name: [v for v in values if v is not None] for name, values in scores.items()}
    return plain(", ".join(f"{name} {statistics.fmean(values):.3f}" for name, values in known.items() if values) or "–")
