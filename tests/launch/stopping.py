"""``python -m mitrain`` in a job; rank 0 has Slurm signal the job's shell in step 3, unless the job was requeued."""

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
                subprocess.run(["scancel", "--batch", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
            if not heard.wait(120):
                raise SystemExit("no signal came")
        return step(self)

    Trainer._step, StopRequest._handle = signalled, handled


if __name__ == "__main__":
    if "SLURM_RESTART_COUNT" not in os.environ:
        arrange()
    sys.exit(main())
