"""One golden checkpoint for every format there has been: today's code reads all of them, and writes the newest."""

import json
import random

import golden
import numpy as np
import pytest
import torch

from mitrain.training import checkpoint

VERSIONS = range(1, checkpoint.FORMAT + 1)


def test_there_is_one_for_every_format():
    assert sorted(path.name for path in golden.GOLDEN.glob("format-*")) == [f"format-{version}" for version in VERSIONS]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_checkpoint_holds_what_its_formula_says(version):
    path = checkpoint.latest(golden.GOLDEN / f"format-{version}")
    found = checkpoint.load(path)
    assert json.loads((path / "manifest.json").read_text())["format"] == version
    assert sum(file.stat().st_size for file in path.iterdir()) < 30_000
    assert (found.step, found.best, found.state) == (golden.STEP, True, golden.state(version))
    expected = golden.tensors()
    assert {group: named.keys() for group, named in found.tensors.items()} == {g: n.keys() for g, n in expected.items()}
    for group, named in expected.items():
        for name, tensor in named.items():
            back = found.tensors[group][name]
            assert back.dtype == tensor.dtype and torch.equal(back, tensor), (group, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_its_random_states_go_on_where_they_stopped(version):
    saved = checkpoint.load(checkpoint.latest(golden.GOLDEN / f"format-{version}")).state["rng"]
    checkpoint.seed_rank(golden.SEED, golden.STEP, 0)
    expected = random.random(), np.random.rand(), torch.rand(1)
    checkpoint.set_rng_state(saved if version == 1 else saved[0])
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_the_newest_format_is_written_byte_for_byte(tmp_path):
    made = checkpoint.save(tmp_path, golden.STEP, golden.tensors(), golden.state(checkpoint.FORMAT), best=True)
    kept = checkpoint.latest(golden.GOLDEN / f"format-{checkpoint.FORMAT}")
    for path in kept.iterdir():
        if path.name != "manifest.json":
            assert (made / path.name).read_bytes() == path.read_bytes(), path.name
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (made, kept))
    varies = ("mitrain", "checksum")
    assert {k: v for k, v in one.items() if k not in varies} == {k: v for k, v in two.items() if k not in varies}
