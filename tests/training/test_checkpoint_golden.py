"""A golden checkpoint: today's code reads it, and writes the same bytes."""

import json
import random

import golden
import numpy as np
import torch

from mitrain.training import checkpoint

KEPT = golden.GOLDEN / f"format-{checkpoint.FORMAT}"


def test_the_golden_checkpoint_holds_what_its_formula_says():
    path = checkpoint.latest(KEPT)
    found = checkpoint.load(path)
    assert json.loads((path / "manifest.json").read_text())["format"] == checkpoint.FORMAT
    assert sum(file.stat().st_size for file in path.iterdir()) < 30_000
    assert (found.step, found.best, found.state) == (golden.STEP, True, golden.state())
    expected = golden.tensors()
    assert {group: named.keys() for group, named in found.tensors.items()} == {g: n.keys() for g, n in expected.items()}
    for group, named in expected.items():
        for name, tensor in named.items():
            back = found.tensors[group][name]
            assert back.dtype == tensor.dtype and torch.equal(back, tensor), (group, name)


def test_its_random_states_go_on_where_they_stopped():
    saved = checkpoint.load(checkpoint.latest(KEPT)).state["rng"]
    checkpoint.seed_rank(golden.SEED, golden.STEP, 0)
    expected = random.random(), np.random.rand(), torch.rand(1)
    checkpoint.set_rng_state(saved[0])
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_the_format_is_written_byte_for_byte(tmp_path):
    made = checkpoint.save(tmp_path, golden.STEP, golden.tensors(), golden.state(), best=True)
    kept = checkpoint.latest(KEPT)
    for path in kept.iterdir():
        if path.name != "manifest.json":
            assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (made, kept))
    varies = ("mitrain", "checksum")
    assert {k: v for k, v in one.items() if k not in varies} == {k: v for k, v in two.items() if k not in varies}
