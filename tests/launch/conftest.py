"""One small world for all launchers, and the losses that each of them has to reach."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import PATH, ROOT, losses, make_world

from mitrain.cli import main


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("launched"))


@pytest.fixture(scope="session")
def alone(world) -> list[float]:
    """The losses of plain Python, one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MITRAIN_CACHE", str(world / "cache"))
        assert main(["train", str(world / "config.yaml"), "--run-dir", str(world / "alone"), "--json"]) == 0
    return losses(world / "alone")


@pytest.fixture(scope="session")
def environment(world) -> dict[str, str]:
    ours = {"PYTHONPATH": PATH, "PYTHON": sys.executable, "MITRAIN_CACHE": str(world / "ranks-cache")}
    return {**os.environ, **ours, "OMP_NUM_THREADS": "1", "MITRAIN_TIMEOUT": "900"}


@pytest.fixture
def same_losses(alone) -> Callable[[Path], None]:
    """Frozen features are encoded in other groups of images, which moves them by rounding; float32 then gives 1e-5."""

    def check(folder: Path) -> None:
        assert losses(folder) == pytest.approx(alone, rel=1e-5)

    return check


@pytest.fixture
def run_script(environment) -> Callable[..., subprocess.CompletedProcess]:
    """Runs ``launch/NAME ARGUMENTS…``."""

    def run(name: str, *arguments: object, timeout: float = 1800, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "launch" / name), *map(str, arguments)]
        return subprocess.run(command, env={**environment, **env}, capture_output=True, text=True, timeout=timeout, cwd=ROOT)

    return run
