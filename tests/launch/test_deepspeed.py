"""The deepspeed launcher on this machine."""

import importlib.util
import json

import pytest


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_the_deepspeed_launcher_trains_on_two_ranks(run_script, world, same_losses):
    """It adds --local_rank=N before our words."""
    done = run_script("deepspeed.sh", 2, "train", world / "config.yaml", "--run-dir", world / "deepspeed", "--json")
    assert done.returncode == 0, done.stderr
    begin = done.stdout.index("{\n")
    assert json.loads(done.stdout[begin : done.stdout.index("\n}") + 2])["run"] == str(world / "deepspeed")
    same_losses(world / "deepspeed")
