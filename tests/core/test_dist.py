"""Ranks: who is who by the environment of each launcher, and how a half-set one is refused."""

import socket

import pytest
import torch

from mitrain.core import dist
from mitrain.core.dist import RankInfo, rank_info
from mitrain.core.errors import RankError

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MEET}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, RankInfo(0, 1, 0)),
        (TORCHRUN, RankInfo(3, 4, 1)),
        ({**SRUN, **TORCHRUN}, RankInfo(3, 4, 1)),  # srun torchrun
        ({**SRUN, **MEET, "SLURM_STEP_ID": "0"}, RankInfo(1, 2, 0)),
        ({**SRUN, **MEET}, RankInfo(1, 2, 0)),
        (SRUN, RankInfo(0, 1, 0)),  # plain python in a batch script: no step, nowhere to meet
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, RankInfo(0, 1, 0)),
    ],
)
def test_every_launcher_is_understood(env, found):
    assert rank_info(env) == found


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0"}, "sets RANK but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "sets WORLD_SIZE but not RANK"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "not LOCAL_RANK"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "not MASTER_PORT"),
        ({**SRUN, "SLURM_STEP_ID": "0"}, "not MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "4"}, "no rank has RANK=4 WORLD_SIZE=4"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1 is not a number"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT=http is not a number"),
    ],
)
def test_half_an_environment_is_refused_in_one_line(env, says):
    with pytest.raises(RankError, match=says) as refused:
        rank_info(env)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", ""])
def test_the_timeout_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("MITRAIN_TIMEOUT", text)
    with pytest.raises(RankError, match="MITRAIN_TIMEOUT"):
        dist.timeout()


def test_alone_everything_is_the_identity(capsys):
    value = torch.arange(3.0)
    with dist.process_group() as here:
        assert here == RankInfo() and dist.is_main() and not dist.initialized()
        assert dist.sum_across(value) is value
        assert dist.any_rank(True) and not dist.any_rank(False)
        assert dist.gather("a") == ["a"] and dist.from_main(lambda: "b") == "b"
        assert dist.first_not_none("c") == "c" and dist.first_not_none(None) is None
        dist.barrier()
        dist.copy_from_main([value])
    dist.say("heard")
    assert capsys.readouterr().out == "heard\n" and value.tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 32])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_everything_once_and_even(count, world):
    parts = [list(range(count))[dist.shard_of(count, RankInfo(rank, world))] for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.fixture
def first_of_two(monkeypatch):
    """The environment of rank 0 of 2, whose partner never comes; the socket holds its port until it is closed."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in {**env, "MITRAIN_TIMEOUT": "1"}.items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_port_in_use_is_named(first_of_two):
    first_of_two.listen()
    with pytest.raises(RankError, match=r"port of 127.0.0.1:\d+ is in use: set MASTER_PORT"), dist.process_group():
        pass


def test_a_rank_that_never_comes_is_given_up(first_of_two):
    first_of_two.close()
    late = pytest.raises(RankError, match=r"rank 0 waited 1 s at 127.0.0.1:\d+ and not all 2 ranks came")
    with late, dist.process_group():
        pass
    assert not dist.initialized()


def test_a_listener_that_never_speaks_holds_no_rank_beyond_its_time(first_of_two, monkeypatch):
    """torch's own call waits for an answer without end."""
    first_of_two.listen()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist, "GRACE_S", 0.5)
    late = pytest.raises(RankError, match=r"rank 1 waited 1 s at 127.0.0.1:\d+ and not all 2 ranks came")
    with late, dist.process_group():
        pass
    assert not dist.initialized()
