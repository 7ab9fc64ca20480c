"""Every way to read text and picture together trains on two ranks as in one process."""

from folders import own_cache
import pytest
from methods_world import configured, make_world
from ranks import losses_of, run_folder

from mitrain.cli import main

CASES = [
    ("pmf", "classify", {}),
    ("visual-prefix", "classify", {}),
    ("full", "classify", {}),
    ("gated-xattn", "classify", {}),
    ("vlora", "classify", {}),
    ("uniadapter", "classify", {}),
    ("aurora", "retrieve", {"adapter": {"dropout": 0.0}}),
    ("pmf", "retrieve", {"task": {"queue": 12, "ramp": 2}}),
]
"""Without noise and dropout, which are drawn per rank, and without losses over a whole batch of one rank, as MoPE's."""


@pytest.fixture(scope="module")
def world(tmp_path_factory, forge):
    path = make_world(tmp_path_factory.mktemp("methods"))
    files = [str(configured(path, *case[:2], **case[2])) for case in CASES]
    with own_cache(path):
        for file in dict.fromkeys(files):
            assert main(["train", file, "--runs", str(path / "one"), "--json"]) == 0
    environment = {"MITRAIN_CACHE": str(path / "cache"), "MITRAIN_TIMEOUT": "120"}
    ended = forge.start(2, "methods_worker:run", path, *files, **environment).wait()
    assert [rank.code for rank in ended] == [0, 0], "".join(rank.err for rank in ended)
    return path


@pytest.mark.parametrize(("method", "task", "changes"), CASES, ids=[f"{task}-{method}" for method, task, _ in CASES])
def test_two_ranks_train_as_one_process(world, method, task, changes):
    one, two = (losses_of(run_folder(world / place, f"{task}-{method}")) for place in ("one", "two"))
    assert len(one) == 4 and one[0] != one[-1]
    assert two == pytest.approx(one, rel=1e-4)
