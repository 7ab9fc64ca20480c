"""What the ranks of test_methods_ranks.py do: train each configuration that they are given."""

from pathlib import Path

from mitrain.cli import main


def run(world: str, *configurations: str) -> int:
    codes = [main(["train", path, "--runs", str(Path(world) / "two")]) for path in configurations]
    return max(codes)
