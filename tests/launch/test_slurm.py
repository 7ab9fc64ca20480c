"""``train.sbatch`` in a real Slurm of two nodes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import ROOT, losses, need
from slurm_cluster import PROGRAMS, Cluster

from mitrain.cli import main
from mitrain.training import checkpoint
from mitrain.training.checkpoint.folder import complete_checkpoints

SIGNALLED = "scancel --batch --signal=USR1 $SLURM_JOB_ID"
PREEMPTED = "sbatch --partition=urgent --nodes=2 --ntasks=2 --cpus-per-task=2 --output=/dev/null --wrap='sleep 5'"

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


@pytest.fixture
def stopped_python(tmp_path) -> Path:
    """An interpreter that runs stopping.py in place of ``-m mitrain``."""
    python, stopping = tmp_path / "python", Path(__file__).with_name("stopping.py")
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{stopping}" "$@"\n')
    python.chmod(0o755)
    return python


def test_a_job_on_two_nodes_that_is_signalled_goes_on_where_it_stopped(submit, cluster, world, same_losses, stopped_python):
    """Slurm signals the job's shell, the shell all ranks; the job puts itself back into the queue and finishes."""
    run = world / "slurm"
    number, log = submit(world / "config.yaml", PYTHON=str(stopped_python), RUN=str(run), STOPPED_BY=SIGNALLED)
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
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0"), log.read_text()
    assert log.read_text().count("stepz") == 1


def test_a_preempted_run_is_the_undisturbed_one_bit_for_bit(
    cluster, environment, world, stopped_python, monkeypatch, tmp_path, capsys
):
    """By ``mitrain launch slurm``: a more urgent job takes both nodes in step 3, and is through before the run goes on."""
    for name, value in {**environment, "PATH": cluster.env["PATH"], "SLURM_CONF": cluster.env["SLURM_CONF"]}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def launched(name: str) -> tuple[dict[str, str], str, Path]:
        log, run = tmp_path / f"{name}.log", world / name
        words = ["launch", "slurm", str(world / "config.yaml"), "--nodes", "2", "--run-dir", str(run), "--json"]
        assert main([*words, f"--sbatch=--output={log}"]) == 0
        job = json.loads(capsys.readouterr().out)
        assert job["run"] == str(run)
        return cluster.wait(job["job"]), log.read_text(), run

    ended, said, undisturbed = launched("undisturbed")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), said
    monkeypatch.setattr(sys, "executable", str(stopped_python))
    monkeypatch.setenv("STOPPED_BY", PREEMPTED)
    ended, said, preempted = launched("preempted")
    assert (ended["JobState"], ended["Restarts"], ended["NumNodes"]) == ("COMPLETED", "1", "2"), said
    assert "after step 3" in said and "stopped by SIG" in said
    assert losses(preempted) == losses(undisturbed)
    one, other = (checkpoint.load(checkpoint.latest(run)) for run in (preempted, undisturbed))
    assert one.step == other.step and one.state["rng"] == other.state["rng"]
    for group, tensors in other.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(one.tensors[group][name], tensor), (group, name)
