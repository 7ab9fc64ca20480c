"""``mitrain bench NAME``: the benchmarks, a program of its own in the repository, which the wheel does not have."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mitrain.core.errors import UserError

PROGRAM = Path(__file__).parents[2] / "benchmarks"


def bench(words: Sequence[str]) -> int:
    """Run the program with its ``words`` in place of this one; returns only where it is not there."""
    if (PROGRAM / "__main__.py").is_file():
        os.execv(sys.executable, [sys.executable, str(PROGRAM), *words])
    print(
        "mitrain: the benchmarks are in the folder benchmarks/ of mitrain's repository, and not in the installed package:"
        " run mitrain from a clone",
        file=sys.stderr,
    )
    return UserError.exit_code
