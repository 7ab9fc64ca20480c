"""``python -m mitrain`` in a job that is not let through: in step 3 rank 0 calls what $STOPPED_BY says, unless the job was
requeued, and all ranks wait for the signal that comes of it."""

import os
import subprocess
import sys
import threading

from mitrain.cli import main
from mitrain.training.guard import StopRequest
from mitrain.training.trainer import Trainer

STEP = 3


def arrange() -> None:
    step, handle, heard = Trainer._step, StopRequest._handle, threading.Event()

    def handled(self, *args):
        handle(self, *args)
        heard.set()

    def signalled(self):
        if self.engine.steps == STEP - 1:
            if os.environ["SLURM_PROCID"] == "0":
                subprocess.run(os.environ["STOPPED_BY"], shell=True, check=True)
            if not heard.wait(120):
                raise SystemExit("no signal came")
        return step(self)

    Trainer._step, StopRequest._handle = signalled, handled


if __name__ == "__main__":
    if "SLURM_RESTART_COUNT" not in os.environ:
        arrange()
    sys.exit(main())
