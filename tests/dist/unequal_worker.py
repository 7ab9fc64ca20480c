"""What the ranks of test_unequal_ranks.py do: a command in a folder of their own, rank 1 perhaps with words of its own."""

import os
from pathlib import Path

import torch

import mitrain.cli.train
from mitrain import dist, fingerprint
from mitrain.cli import main
from mitrain.errors import UserError


def command(world: str, spoiled: str, *words: str) -> int:
    """Run ``words`` in WORLD/0 or WORLD/1; SPOILED is "code", or a word that rank 1 gives in place of the last, or "-"."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    os.chdir(Path(world) / str(rank))
    if rank and spoiled == "code":
        versions = fingerprint.code()
        fingerprint.code = lambda: {**versions, "sources": fingerprint.digest(["other sources"])}
    elif rank and spoiled != "-":
        words = (*words[:-1], spoiled)
    return main(words)


def fail(*errors: str) -> int:
    """A command in which each rank has the error that stands in its place, or with "-" waits for the others."""
    own = errors[int(os.environ["RANK"])]

    def run_train(_: object) -> None:
        if own == "-":
            dist.barrier()
        raise UserError(own)

    mitrain.cli.train.run_train = run_train
    return main(["train", "config.yaml"])


def out_of_memory(world: str, *words: str) -> int:
    """Rank 1 has no memory for its second share of a batch."""
    from mitrain.trainer import Trainer

    accumulate, calls = Trainer._accumulate, []

    def greedy(self, draws, share):
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            torch.empty(1 << 50)
        return accumulate(self, draws, share)

    Trainer._accumulate = greedy
    return command(world, "-", *words)
