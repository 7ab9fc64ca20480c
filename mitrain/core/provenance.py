"""What a committed number needs beside it: the commit, the versions and the machine it was made with."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

RESULTS = ("docs", "kernels/bench/results", "*.md")
"""What measuring changes itself, and text: no number depends on it."""


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
    """The processor, and how many cores of it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"
