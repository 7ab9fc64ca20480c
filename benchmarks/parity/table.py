"""The matrix as Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.parity.cells import NOISY, OURS
from benchmarks.parity.judge import CONFIDENCE, SLACK
from mitrain.core import markdown
from mitrain.core.provenance import sentence

Row = dict[str, Any]
COLUMNS = (
    "who",
    "weights",
    "ZeRO",
    "ranks",
    "loss",
    "relative difference",
    "tolerance",
    "frozen MiB/rank",
    "limit",
    "gathered MiB/step",
    "optimizer MiB/rank",
    "ms/step",
    "",
)


def table(rows: Sequence[Row], made: dict[str, Any]) -> str:
    """One line per cell, what stands in it below, and how to make it again."""
    return "\n".join([*markdown.table(COLUMNS, [line(row) for row in rows]), "", *notes(rows, made), ""])


def line(row: Row) -> list[str]:
    ranks = f"{row['ranks']}" + (f", {row['accumulate']} micro-batches" if row["accumulate"] > 1 else "")
    ranks += f", order {row['order']}" if row.get("order") else ""
    head = [row["who"], row["precision"], str(row["zero"]), ranks]
    if "error" in row:
        return [*head, f"failed: {markdown.plain(row['error'])}", *[""] * (len(COLUMNS) - 6), mark(row)]
    return [
        *head,
        f"{row['loss']:.6f}",
        number(row["relative_difference"]),
        number(row["tolerance"]),
        mib(row["resident_frozen_bytes_per_rank"]),
        mib(row["limit_bytes_per_rank"]),
        mib(row["gathered_bytes_per_step"]),
        mib(row["optimizer_bytes"]),
        f"{row['step_ms']:.0f}",
        mark(row),
    ]


def mark(row: Row) -> str:
    return {True: "ok", False: "**out**", None: "peer"}[row["ok"]]


def number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def mib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"


def notes(rows: Sequence[Row], made: dict[str, Any]) -> list[str]:
    noisy = sorted({row["precision"] for row in rows if row["who"] == OURS} & set(NOISY))
    text = [
        f"Loss of the training step after {made['steps']} updates of {made['batch']} samples; the difference is to the"
        " single-process, unsharded run of the same precision (ZeRO 0, 1 rank)."
    ]
    if noisy:
        text.append(
            f"Where rounding depends on the order of sums ({', '.join(noisy)}) the tolerance is the spread of the unsharded"
            " runs, which differ in that order alone (ranks, micro-batches, order of a batch's samples): what two of them"
            f" differ by in {100 * CONFIDENCE:.0f} of 100 cases, by their standard deviation and Student's distribution."
        )
    text += [
        "Frozen bytes are counted from shards and storages after the last step, encoders included; the limit at stage 3 is"
        f" {SLACK} × (payload + scales) / ranks. Gathered: outputs of all-gathers of weights, of a rank. Optimizer: states"
        " and the weights' copies that they belong to.",
        "Step times are medians on a machine that was not idle: they rank nothing.",
    ]
    return [" ".join(text), "", sentence(made)]
