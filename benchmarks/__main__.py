"""What ``mitrain bench NAME`` starts: puts this checkout first on the path, then runs the benchmark."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":
    from benchmarks.command import main

    sys.exit(main())
