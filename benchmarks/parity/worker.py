"""What each rank of a cell does. Importing this imports everything that a rank needs."""

from pathlib import Path

import torch

from benchmarks.parity.cells import BITSANDBYTES, PEFT, Cell, Plan
from benchmarks.parity.peers import InBitsandbytes, lora
from benchmarks.parity.steps import Subject, measure, ours
from mitrain.core import dist
from mitrain.core.files import write_json
from mitrain.training.engine.zero import deepspeed

deepspeed()  # when this module is preloaded, before a rank is forked


def work(cell: Cell, plan: Plan, out: Path) -> None:
    """Measure ``cell`` together with its other ranks; rank 0 writes the row to ``out``."""
    torch.set_num_threads(1)
    with dist.process_group():
        row = measure(subject(cell, plan), cell, plan)
        dist.from_main(lambda: write_json(out, row))


def subject(cell: Cell, plan: Plan) -> Subject:
    if cell.who == PEFT:
        return lora(cell, plan)
    return ours(cell, plan, InBitsandbytes) if cell.who == BITSANDBYTES else ours(cell, plan)
