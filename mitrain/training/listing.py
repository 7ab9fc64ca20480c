"""The runs in a folder side by side: ``mitrain runs``. Reads what runs say of themselves; no weights, no model."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mitrain.core import parsing
from mitrain.core.errors import ConfigError
from mitrain.training import fingerprint, state
from mitrain.training.checkpoint.folder import complete_checkpoints

COLUMNS = ("run", "state", "step", "best", "at", "task", "method", "changed")
LONGEST = 80


def listed(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What each run in ``folders`` (of runs, or runs themselves) is, the last changed first. ConfigError for no run."""
    found = [path for folder in folders for path in runs_in(folder)]
    return sorted((described(path) for path in found), key=lambda run: run["changed"], reverse=True)


def runs_in(folder: Path) -> list[Path]:
    if (folder / "config.yaml").is_file():
        return [folder]
    inner = [path.parent for path in sorted(folder.glob("*/config.yaml"))]
    if not inner:
        raise ConfigError(
            f"{str(folder)!r} is no run folder and holds none: runs are made in runs/ where --runs names no other"
        )
    return inner


def described(run: Path) -> dict[str, Any]:
    """One run; what it cannot say is None."""
    config = {}
    with suppress(OSError, ValueError):
        config = parsing.parse_yaml((run / "config.yaml").read_text("utf-8"))
    config = config if isinstance(config, dict) else {}
    ended = parsing.object_in(run / "summary.json")
    known = complete_checkpoints(run / "checkpoints")  # by their sizes: nothing is read that is large
    kept = max(known, key=lambda item: item[1].sequence)[0] if known else None
    reached = parsing.object_in(kept / "state.json") if kept else {}
    newest = max((path.stat().st_mtime for path in (run, *run.glob("*.json*"), *run.glob("checkpoints/*"))), default=0.0)
    steps = reached.get("steps") or ended.get("steps")
    return {
        "run": str(run),
        "state": state_of(run, ended, bool(kept)),
        "step": int(kept.name.rpartition("-")[2]) if kept else None,
        "steps": steps,
        "best": ended.get("best", reached.get("best")),
        "at": ended.get("best_step", reached.get("best_step")),
        "metric": ended.get("metric"),
        "task": name_in(config, "task"),
        "method": name_in(config, "adapter"),
        "changed": time.strftime("%Y-%m-%d %H:%M", time.localtime(newest)),
        "config": config,
    }


def state_of(run: Path, ended: dict[str, Any], saved: bool) -> str:
    """In words: whether it trains, has ended and why, or goes on when it is resumed."""
    if told := state.read(run):
        return state.in_words(told)
    if ended:
        return f"done ({ended.get('ended', 'last step')})"
    return "stopped" if saved else "not begun"


def name_in(config: dict[str, Any], kind: str) -> str | None:
    section = config.get(kind)
    return section.get("name") if isinstance(section, dict) else None


def settings_that_differ(runs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Setting → its value in each run, of all that are not alike."""
    flats = [fingerprint.flat(run["config"]) for run in runs]
    names = dict.fromkeys(name for flat in flats for name in flat)
    rows = {name: [flat.get(name, "–") for flat in flats] for name in names if name != "name"}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each run, under a heading."""
    return aligned([COLUMNS, *(tuple(cell(run, column) for column in COLUMNS) for run in runs)])


def comparison(runs: Sequence[dict[str, Any]], differing: Mapping[str, Sequence[str]]) -> str:
    """A line for each setting that differs."""
    names = [Path(run["run"]).name for run in runs]
    return aligned([("setting", *names), *((name, *values) for name, values in differing.items())])


def cell(run: dict[str, Any], column: str) -> str:
    value = run[column]
    if column == "step" and run["steps"]:
        return f"{value or 0}/{run['steps']}"
    return f"{value:.4f}" if isinstance(value, float) else "–" if value is None else str(value)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns; what is longer than `LONGEST` loses its end."""
    rows = [[text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for text in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
