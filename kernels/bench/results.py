"""Samples to rows, rows to CSV and back. A row is one provider, mode and case; only green providers have rows."""

import csv
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import Case, parse_shape, shape_text
from bench.rounds import Measurement, Record

RESULTS = Path(__file__).parent / "results"
NUMBERS = {
    "median_ms": float,
    "q20_ms": float,
    "q80_ms": float,
    "ratio_to_plain": float,
    "ratio_of_medians": float,
    "saved_bytes": int,
    "saved_to_plain": float,
    "peak_bytes": int,
    "rounds": int,
    "samples": int,
}
COLUMNS = (
    "op",
    "provider",
    "mode",
    "shape",
    "variant",
    "gate",
    "dtype",
    *NUMBERS,
    "device",
    "versions",
    "commit",
    "date",
)


def rows(found: Measurement, device: str) -> list[dict[str, Any]]:
    """``ratio_to_plain``: median over rounds of (median of the provider ÷ median of plain) within the round."""
    made, result = provenance(device), []
    for (i, name), record in found.records.items():
        case, plain = found.cases[i], found.records[i, "plain"]
        if not record.faults and not record.refused:
            result += [row(case, name, mode, record, plain) | made for mode in case.modes]
    return result


def row(case: Case, name: str, mode: str, record: Record, plain: Record) -> dict[str, Any]:
    kept = record.samples[mode]
    every = [ms for samples in kept for ms in samples]
    q20, _, _, q80 = statistics.quantiles(every, n=5, method="inclusive") if len(every) > 1 else every * 4
    saved = record.memory["saved_bytes"]
    return {
        "op": case.op,
        "provider": name,
        "mode": mode,
        "shape": case.shape,
        "variant": case.variant,
        "gate": gate_of(case, name),
        "dtype": case.dtype,
        "median_ms": statistics.median(every),
        "q20_ms": q20,
        "q80_ms": q80,
        **ratios(kept, plain, mode),
        "saved_bytes": saved,
        "saved_to_plain": saved / plain.memory["saved_bytes"] if plain.memory.get("saved_bytes") else None,
        "peak_bytes": record.memory["peak_bytes"][mode],
        "rounds": len(kept),
        "samples": len(every),
    }


def ratios(kept: list[list[float]], plain: Record, mode: str) -> dict[str, float | None]:
    """None where the baseline itself is red."""
    if plain.faults:
        return {"ratio_to_plain": None, "ratio_of_medians": None}
    baseline = plain.samples[mode]
    pairs = [statistics.median(own) / statistics.median(base) for own, base in zip(kept, baseline, strict=True)]
    medians = [statistics.median(ms for samples in rounds for ms in samples) for rounds in (kept, baseline)]
    return {"ratio_to_plain": statistics.median(pairs), "ratio_of_medians": medians[0] / medians[1]}


def gate_of(case: Case, name: str) -> str:
    """The gate that was computed: the release knows one per sequence only."""
    if case.op != "infused_attention" or name == "plain":
        return ""
    return "sequence" if name in ("eager", "compile") else case.gate


def provenance(device: str) -> dict[str, str]:
    return {
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name(0)
    found = None
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> str:
    names = [f"python {platform.python_version()}"]
    for package in ("torch", "triton", "flash-attn"):
        try:
            names.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(names)


def commit() -> str:
    """The checkout's commit, marked when files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def write_csv(path: Path, kept: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(name, x) for name, x in one.items()} for one in kept)


def cell(name: str, x: Any) -> Any:
    if name == "shape":
        return shape_text(x)
    return f"{x:.5g}" if isinstance(x, float) else x


def read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: value(name, text) for name, text in one.items()} for one in csv.DictReader(file)]


def value(name: str, text: str) -> Any:
    if name == "shape":
        return parse_shape(text)
    if name in NUMBERS:
        return NUMBERS[name](text) if text else None
    return text


def write_results(found: Sequence[dict[str, Any]], device: str, out: Path) -> list[Path]:
    """One file per op: <op>-cpu.csv, <op>-<name of the GPU>.csv."""
    label = "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    paths = []
    for op in dict.fromkeys(one["op"] for one in found):
        paths.append(out / f"{op}-{label}.csv")
        write_csv(paths[-1], (one for one in found if one["op"] == op))
    return paths
