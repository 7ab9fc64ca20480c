"""``mitrain launch slurm``: the script that is rendered, what is refused before, and what sbatch is given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import as_json

from mitrain.cli import launch, main

CONFIG = "quickstart"
SLURM = ["launch", "slurm", CONFIG]


def script(capsys, *words: str) -> str:
    assert main([*SLURM, *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def options(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}


def commands(text: str) -> list[str]:
    """The lines of shell before the template's body."""
    return [line for line in text.partition(launch.BODY)[0].splitlines() if not line.startswith("#")]


def test_a_script_has_sbatchs_options_and_the_body_of_the_template(capsys):
    text = script(capsys, "--nodes", "2", "--gpus-per-node", "4", "--cpus-per-task", "8", "--time", "1:00:00",
                  "train.steps=9", "--sbatch=--partition=long", "--sbatch=--exclusive")  # fmt: skip
    assert options(text) == {
        "--job-name=mitrain", "--output=slurm-%j.log", "--open-mode=append", "--requeue", "--signal=B:USR1@120",
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--time=1:00:00",
        "--partition=long", "--exclusive",
    }  # fmt: skip
    package = Path(launch.__file__).parents[1]
    assert commands(text) == [
        f"export MITRAIN_ROOT={package} PYTHON={sys.executable}",
        "set -- quickstart train.steps=9",
    ]
    assert (package / "launch" / "env.sh").is_file()
    assert text.rstrip().endswith(launch.TEMPLATE.read_text().partition(launch.BODY)[2].rstrip())
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_run_for_each_seed(capsys):
    text = script(capsys, "--array", "0-4%2", "--run-dir", "/shared/my runs/a", "--grace", "300")
    assert {"--array=0-4%2", "--output=slurm-%A_%a.log", "--signal=B:USR1@300", "--nodes=1"} <= options(text)
    assert commands(text)[1:] == [
        "export RUN='/shared/my runs/a'-$SLURM_ARRAY_TASK_ID",
        'set -- quickstart "seed=$SLURM_ARRAY_TASK_ID"',
    ]


def test_a_file_goes_by_its_whole_path_and_its_words_as_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my config.yaml").write_text(Path(launch.PACKAGE / "configs/quickstart.yaml").read_text())
    assert main(["launch", "slurm", "my config.yaml", "name=a-b", "--dry-run"]) == 0
    line = commands(capsys.readouterr().out)[-1]
    said = subprocess.run(["bash", "-c", f'{line}; printf "%s\\n" "$@"'], capture_output=True, text=True).stdout
    assert said.splitlines() == [f"{tmp_path}/my config.yaml", "name=a-b"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.stepz=3"], "stepz"),
        (["--nodes", "0"], "--nodes=0: give 1 or more"),
        (["--cpus-per-task", "0"], "--cpus-per-task=0"),
        (["--array", "0..4"], "'0..4' lists no seeds"),
        (["--array", "0-4", "seed=3"], "leave out seed="),
        (["--sbatch=-p long"], "is no option of sbatch"),
        (["--sbatch=--comment=two words"], "leave out spaces"),
        (["--time", "1:00\n#SBATCH --x"], "leave out spaces"),
    ],
)
def test_a_mistake_is_told_before_the_queue(capsys, words, says):
    assert main([*SLURM, *words, "--dry-run"]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and told.out == ""


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for sbatch that keeps the script and answers with the text or the code it is told."""

    def answer(text: str, code: int = 0) -> Path:
        program = tmp_path / "sbatch"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/script\n{text}\nexit {code}\n')
        program.chmod(0o755)
        return tmp_path / "script"

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    return answer


def test_the_script_is_submitted_and_the_job_told(sbatch, capsys):
    given = sbatch("echo '17;east'")
    found = as_json(capsys, *SLURM)
    assert (found["job"], found["run"]) == ("17", "runs/slurm-17") and given.read_text() == found["script"]
    assert given.with_name("words").read_text() == "--parsable\n"
    assert main([*SLURM, "--array", "1,2"]) == 0
    assert "job 17, run folder runs/slurm-17_SEED" in capsys.readouterr().out


def test_what_sbatch_refuses_is_one_line(sbatch, capsys, monkeypatch):
    sbatch("echo 'sbatch: error: invalid partition' >&2", 1)
    assert main(SLURM) == 2
    assert "sbatch refuses the job (sbatch: error: invalid partition): change" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(SLURM) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
