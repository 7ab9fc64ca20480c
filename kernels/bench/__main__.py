"""``python kernels/bench``: puts this checkout's kernels/ first on the path, then runs the command."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.command import main  # noqa: E402 - found only now

if __name__ == "__main__":
    sys.exit(main())
