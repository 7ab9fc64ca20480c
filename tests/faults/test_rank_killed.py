"""A rank is killed or falls silent: the others end in one line, nothing is torn, and the run goes on as if nothing was."""

import json
import re
import socket

import pytest
from ranks import STEPS, losses, make_world, run_folder

from mitrain.training import checkpoint
from mitrain.training.checkpoint.folder import complete_checkpoints

RANKS = 2
SIGKILL = -9


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("killed"))


def environment(world, seconds: int = 120) -> dict[str, str]:
    return {"MITRAIN_CACHE": str(world / "cache"), "MITRAIN_TIMEOUT": str(seconds)}


@pytest.fixture(scope="module")
def undisturbed(world, forge) -> list[float]:
    arguments = (world / "config.yaml", "name=undisturbed", "--runs", world, "--json")
    ended = forge.start(RANKS, "rank_worker:train", *arguments, **environment(world)).wait()
    assert [rank.code for rank in ended] == [0] * RANKS, "".join(rank.err for rank in ended)
    return losses(run_folder(world, "undisturbed"))


def complaint(ended, rank: int) -> str:
    """The one line in which a rank ended that lost another."""
    assert (ended.code, ended.out) == (2, "")
    (line,) = [line for line in ended.err.splitlines() if not line.startswith("run folder: ")]
    who = "mitrain: rank 0" if rank == 0 else f"mitrain, rank {rank}: rank {rank}"
    assert re.fullmatch(rf"{who} lost the others \(.+\): look for the first message of another rank, then resume", line)
    return line


def check_and_resume(world, forge, folder, last: int, undisturbed) -> None:
    """What the dead left is whole, its newest checkpoint is of step ``last``, and two ranks go on from there."""
    visible = [path for path in (folder / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert sorted(path for path, _ in complete_checkpoints(folder / "checkpoints")) == sorted(visible)
    assert checkpoint.load(checkpoint.latest(folder)).step == last
    assert not (folder / "summary.json").exists()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["step"] <= STEPS for line in lines)
    ended = forge.start(RANKS, "rank_worker:train", "--resume", folder, "--json", **environment(world)).wait()
    assert [rank.code for rank in ended] == [0] * RANKS, "".join(rank.err for rank in ended)
    assert losses(folder) == undisturbed  # bit for bit
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize(
    ("victim", "moment", "last"),
    [(1, "in-step", 3), (0, "in-step", 3), (1, "evaluate", 3), (0, "evaluate", 3), (0, "save-4", 3), (0, "save-12", 3)],
)
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(world, forge, undisturbed, tmp_path, victim, moment, last):
    arguments = (victim, moment, "SIGKILL", world / "config.yaml", "--run-dir", tmp_path / "run", "--json")
    ended = forge.start(RANKS, "rank_worker:train_and_fail", *arguments, **environment(world)).wait()
    assert ended[victim].code == SIGKILL, ended[victim].err
    line = complaint(ended[1 - victim], 1 - victim)
    assert re.search(r"\((Connection closed|Read error|Write error)", line) and "/" not in line, line
    check_and_resume(world, forge, tmp_path / "run", last, undisturbed)


def test_of_three_ranks_every_other_one_ends(world, forge, tmp_path):
    arguments = (1, "in-step", "SIGKILL", world / "config.yaml", "--run-dir", tmp_path / "run", "--json")
    ended = forge.start(3, "rank_worker:train_and_fail", *arguments, **environment(world)).wait()
    assert ended[1].code == SIGKILL
    for rank in (0, 2):
        complaint(ended[rank], rank)


@pytest.mark.parametrize(("part", "says"), [("input", "waiting for input"), ("compute", "forward and backward")])
def test_a_straggler_is_named_on_rank_0_with_what_it_waits_for(world, forge, tmp_path, part, says):
    arguments = (part, world / "config.yaml", "--run-dir", tmp_path / "run", "--json", "train.log_every=2")
    first, second = forge.start(RANKS, "rank_worker:train_unevenly", *arguments, **environment(world)).wait()
    assert (first.code, second.code, second.err) == (0, 0, ""), first.err + second.err
    (line,) = [line for line in first.err.splitlines() if "holds the others up" in line]
    host = socket.gethostname()
    seconds = "4.00 s", "theirs is 0.40 s"  # two micro-batches a step, two steps a report
    assert line.startswith(f"mitrain: rank 1 on {host} holds the others up: {seconds[0]} {says} in the 2 steps to 6")
    assert seconds[1] in line


def test_after_the_first_step_a_silent_rank_is_given_up_sooner(world, forge, tmp_path):
    arguments = (1, "in-step", "SIGSTOP", world / "config.yaml", "--run-dir", tmp_path / "run", "--json")
    env = {**environment(world), "MITRAIN_STEP_TIMEOUT": "9"}
    group = forge.start(RANKS, "rank_worker:train_and_fail", *arguments, **env)
    (ended,) = group.wait(0)
    group.kill(1)
    assert "9000ms" in complaint(ended, 0)


def test_a_silent_rank_is_given_up_after_the_timeout(world, forge, undisturbed, tmp_path):
    """The timeout is far longer than a step takes here, and is waited for once."""
    arguments = (1, "in-step", "SIGSTOP", world / "config.yaml", "--run-dir", tmp_path / "run", "--json")
    group = forge.start(RANKS, "rank_worker:train_and_fail", *arguments, **environment(world, seconds=8))
    (ended,) = group.wait(0)
    line = complaint(ended, 0)
    assert "8000ms" in line and re.search(r"; rank 1 on \S+ had not come to step 4\)", line), line
    group.kill(1)
    (silent,) = group.wait(1)
    assert silent.code == SIGKILL
    check_and_resume(world, forge, tmp_path / "run", 3, undisturbed)
