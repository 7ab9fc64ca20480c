"""What a committed number needs beside it: the commit, the versions and the machine it was made with."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from mitrain.core.markdown import code

RESULTS = ("docs", "kernels/bench/results", "*.md")
"""What measuring changes itself, and text: no number depends on it."""
MARK = "sha256:"


def digest(values: Iterable[Any]) -> str:
    """sha256 of plain values in their order, marked as a digest."""
    seen, rest = hashlib.sha256(), iter(values)
    while part := list(islice(rest, 1024)):
        seen.update(json.dumps(part, sort_keys=True, default=repr).encode())
    return MARK + seen.hexdigest()


def commit() -> str:
    """The checkout's commit, marked when files that a number may depend on differ from it; "unknown" outside a checkout."""
    try:
        name = git("describe", "--always")
        changed = git("status", "--porcelain", "-uno", "--", ":/", *(f":(top,exclude){path}" for path in RESULTS))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + "-dirty" * bool(changed)


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: version(name) for name in packages}


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def made_with(packages: Iterable[str]) -> dict[str, Any]:
    """Date, commit, versions of ``packages`` and machine."""
    today = time.strftime("%Y-%m-%d")
    return {"date": today, "commit": commit(), "versions": versions(packages), "machine": machine()}


def sentence(made: dict[str, Any]) -> str:
    """Markdown that says so of results that ``made["command"]`` makes; versions are a mapping or a text."""
    used = made["versions"]
    versions = used if isinstance(used, str) else ", ".join(f"{name} {number}" for name, number in used.items())
    return f"Made by {code(made['command'])} on {made['date']}, commit {made['commit']}, {versions}, {made['machine']}."
