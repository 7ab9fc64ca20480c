"""``train.sbatch`` in a real Slurm of two nodes."""

import sys
from pathlib import Path

import pytest
from ranks import ROOT, need
from slurm_cluster import PROGRAMS, Cluster

from mitrain.training.checkpoint.folder import complete_checkpoints

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    need(*PROGRAMS)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def submit(cluster, environment, tmp_path):
    """Submits train.sbatch from the clone and returns the job's number and log."""

    def run(*arguments: object, options: tuple[str, ...] = ("--nodes=2", "--ntasks-per-node=1"), **env: str):
        log = tmp_path / "job.log"
        script = ROOT / "launch/slurm/train.sbatch"
        words = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={log}", *options, script, *arguments]
        number = cluster.run(*words, **{**environment, "PATH": cluster.env["PATH"], "MITRAIN_ROOT": str(ROOT), **env})
        assert number.strip().isdecimal(), number
        return number.strip(), log

    return run


def test_a_job_on_two_nodes_that_is_signalled_goes_on_where_it_stopped(submit, cluster, world, same_losses, tmp_path):
    """Slurm signals the job's shell, the shell all ranks; the job puts itself back into the queue and finishes."""
    python = tmp_path / "python"
    stopping = Path(__file__).with_name("stopping.py")
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{stopping}" "$@"\n')
    python.chmod(0o755)
    run = world / "slurm"
    number, log = submit(world / "config.yaml", PYTHON=str(python), RUN=str(run))
    ended = cluster.wait(number)
    assert (ended["JobState"], ended["Restarts"], ended["NumNodes"]) == ("COMPLETED", "1", "2"), log.read_text()
    said = log.read_text()
    assert "stopped by SIGUSR1 after step 3" in said and f"{run} goes on when the job starts again" in said
    assert {manifest.step for _, manifest in complete_checkpoints(run / "checkpoints")} == {3, 6}
    same_losses(run)


def test_a_mistake_ends_the_job_and_is_not_requeued(submit, cluster, world):
    """Two tasks on one node; rank 0 alone names the mistake."""
    number, log = submit(world / "config.yaml", "train.stepz=3", options=("--nodes=1", "--ntasks-per-node=2"))
    ended = cluster.wait(number)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log.read_text()
    assert log.read_text().count("stepz") == 1
