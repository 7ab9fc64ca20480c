"""torchrun's launcher on this machine, with the exit code of the ranks in place of its own 1.

    python launch/torchrun.py --standalone --nproc-per-node 2 -m mitrain train …

2, 75 and 130 of a rank mean the same of all (docs/guide/training.md). A launcher that is itself asked to end hands the
signal on, waits for the ranks to save, and ends with 128 + its number. The options are torchrun's own.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(words: list[str]) -> int:
    try:
        run(parse_args(words))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode  # negative where a signal killed it
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
