"""One job in a run folder: the second is refused in one line, and the next goes on where the first is dead."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from folders import colour_folder, run_settings

from mitrain.cli import main
from mitrain.core import ownership
from mitrain.core.errors import CheckpointError
from mitrain.core.ownership import JOB, MARKER, owned
from mitrain.training import runs

ELSEWHERE = "71\nnode-9\n"  # an owner whose end nobody here can know


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def refused(folder) -> str:
    with pytest.raises(CheckpointError) as error, owned(folder):
        pass
    return str(error.value)


def test_the_owner_is_named_and_how_to_go_on_without_it(tmp_path):
    (tmp_path / MARKER).write_text(ELSEWHERE)
    line = refused(tmp_path)
    assert line.startswith("process 71 on node-9 since ") and f"trains in {tmp_path}: " in line
    assert line.endswith(f"if that process is gone, remove {tmp_path / MARKER}")
    assert (tmp_path / MARKER).read_text() == ELSEWHERE


def test_a_folder_is_owned_until_the_outermost_block_ends(tmp_path):
    with owned(tmp_path):
        with owned(tmp_path):
            pass
        assert (tmp_path / MARKER).read_text().split()[0] == str(os.getpid())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reaped", [True, False])
def test_an_owner_that_was_killed_is_replaced(tmp_path, reaped):
    """Also one that nobody has waited for, which still has a pid."""
    code = f"from filelock import SoftFileLock; lock = SoftFileLock({str(tmp_path / MARKER)!r}); lock.acquire()"
    code += "; print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as first:
        first.stdout.read(1)
        assert f"process {first.pid} on " in refused(tmp_path)
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
        with owned(tmp_path):
            pass
        if reaped:
            first.returncode = -9


def test_a_requeued_slurm_job_goes_on_at_once_on_another_node(tmp_path, monkeypatch):
    (tmp_path / MARKER).write_text(ELSEWHERE)
    (tmp_path / JOB).write_text("5 0")
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    refused(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    refused(tmp_path)  # another step of the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with owned(tmp_path):
        assert (tmp_path / JOB).read_text() == "5 1"


def test_an_owner_outside_slurm_is_not_taken_for_the_job_that_was_there_before(tmp_path, monkeypatch):
    (tmp_path / JOB).write_text("5 0")
    with owned(tmp_path):
        assert not (tmp_path / JOB).exists()


@pytest.fixture
def config(tmp_path):
    values = run_settings(colour_folder(tmp_path, 8, 4, layers=2), train={"steps": 2, "batch": 4}, cache=False)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "config.yaml"


def test_a_second_job_ends_in_one_line_and_touches_nothing(config, tmp_path, capfd):
    run = tmp_path / "run"
    assert main(["train", str(config), "--run-dir", str(run), "--json"]) == 0
    assert not list(run.glob(".owner*"))
    (run / MARKER).write_text(ELSEWHERE)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in (["--resume", str(run)], [str(config), "--run-dir", str(run)]):
        capfd.readouterr()
        assert main(["train", *command]) == 2
        told = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("run folder:")]
        assert len(told) == 1 and told[0].startswith("mitrain: process 71 on node-9 since ")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_trainer_in_python_owns_its_folder_too(config, tmp_path):
    from mitrain.training import schema
    from mitrain.training.trainer import Trainer

    folder = runs.create(schema.load(str(config), []), tmp_path / "runs")
    trainer = Trainer(runs.read_config(folder), folder, quiet=True)
    (folder / MARKER).write_text(ELSEWHERE)
    with pytest.raises(CheckpointError, match="node-9"):
        trainer.fit()
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "config.yaml"]


def test_a_run_that_is_refused_before_its_first_step_leaves_no_folder(config, tmp_path):
    (tmp_path / "data" / "val.jsonl").write_text(json.dumps({"nothing": 1}) + "\n")
    assert main(["train", str(config), "--run-dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_folder_that_two_jobs_begin_at_once_is_not_trained_under_the_others_configuration(
    config, tmp_path, monkeypatch, capfd
):
    run, alone = tmp_path / "run", ownership.owned

    def owned_late(folder):
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("steps: 2\n", "steps: 7\n"))
        return alone(folder)

    monkeypatch.setattr(ownership, "owned", owned_late)
    assert main(["train", str(config), "--run-dir", str(run)]) == 2
    assert "run of another configuration (train.steps is 7 there, 2 here)" in capfd.readouterr().err
    assert runs.read_config(run).train.steps == 7 and not (run / "checkpoints").exists()


def test_a_folder_that_goes_while_a_job_waits_for_it_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()

    def look(self):
        shutil.rmtree(folder)
        return False

    monkeypatch.setattr(ownership.Wait, "look", look)
    (folder / ownership.MARKER).write_text("")  # held, by nobody that can be asked
    with pytest.raises(CheckpointError, match="was deleted or moved away meanwhile"), ownership.owned(folder):
        pytest.fail("owned a folder that is gone")
