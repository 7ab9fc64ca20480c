"""``python kernels/bench``: puts this checkout's kernels/ first on the path, then runs the command.

``python kernels/bench machine-code`` runs that of ``machine_code``, which must not import torch to print a roofline.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":
    if sys.argv[1:2] == ["machine-code"]:
        from bench.machine_code.aot import main

        sys.exit(main(sys.argv[2:]))
    from bench.command import main

    sys.exit(main())
