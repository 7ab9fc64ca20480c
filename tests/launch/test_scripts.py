"""The launch scripts: what is refused, in one line and with exit code 2, and what is handed on."""

import importlib.util
import re
import shutil
import subprocess

import pytest
from ranks import ROOT
from torch.distributed.run import get_args_parser

from mitrain.cli import parser

SCRIPTS = [*sorted(ROOT.glob("launch/*.sh")), *sorted(ROOT.glob("launch/slurm/*"))]
HOSTS = "# two\nnode-1 slots=4\n\nnode-2   slots=2\n"

has_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture
def hosts(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    return path


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("not installed: shellcheck")
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_names_a_site(script):
    """No address, no partition, no account, no queue: those are options of the user."""
    assert not re.search(r"\b\d+\.\d+\.\d+\.\d+\b|--(partition|account|qos)\b", script.read_text())


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, (done.stdout, done.stderr)
    return done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("local.sh", [], "usage: bash launch/local.sh RANKS"),
        ("local.sh", ["two", "train"], "usage"),
        ("local.sh", ["0", "train", "x.yaml"], "usage"),
        ("local.sh", ["2"], "usage"),
        ("deepspeed.sh", [], "usage: bash launch/deepspeed.sh RANKS|HOSTFILE"),
        ("deepspeed.sh", ["2"], "usage"),
        ("deepspeed.sh", ["2", "train"], "usage"),
        ("deepspeed.sh", ["2", "configs/digits.yaml"], "usage"),
        ("slurm/train.sbatch", ["configs/digits.yaml"], "this is a Slurm job: sbatch --nodes=N"),
    ],
)
def test_bad_usage_is_refused(run_script, script, arguments, says):
    assert says in refused(run_script(script, *arguments))


def test_an_absent_interpreter_is_named(run_script):
    for script in ("local.sh", "deepspeed.sh", "slurm/train.sbatch"):
        assert "no Python at /no/python" in refused(run_script(script, "2", "train", "x.yaml", PYTHON="/no/python"))


def test_a_job_of_slurm_that_is_not_submitted_in_the_clone_is_told_so(run_script, tmp_path):
    said = refused(run_script("slurm/train.sbatch", "x.yaml", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7"))
    assert f"no {tmp_path}/launch/env.sh" in said and "MITRAIN_ROOT" in said
    assert "usage" in refused(run_script("slurm/train.sbatch", SLURM_JOB_ID="7"))


@has_deepspeed
@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", [], "names no host"),
        ("# nothing\n", [], "names no host"),
        ("node-1\n", [], "line 1 is not 'HOST slots=RANKS': node-1"),
        ("a slots=2\nb slots=0\n", [], "line 2 is not"),
        ("a slots=2\na slots=2\n", [], "line 2 names a again"),
        ("a slots=2", [], "names one host: run bash launch/deepspeed.sh 2 on it"),
        (HOSTS, ["--no_ssh"], "--no_ssh needs --node_rank N"),
        (HOSTS, ["--no_ssh", "--node_rank", "0"], "--master_addr FIRST_HOST"),
        (HOSTS, ["--no_ssh", "--node_rank=2", "--master_addr=a"], "there is no host 2"),
    ],
)
def test_bad_host_files_are_refused(run_script, tmp_path, text, options, says):
    path = tmp_path / "hosts"
    path.write_text(text)
    assert says in refused(run_script("deepspeed.sh", path, *options, "train", "x.yaml"))


@has_deepspeed
def test_the_example_of_a_host_file_is_read(run_script):
    said = refused(run_script("deepspeed.sh", "launch/hostfile.example", "--no_ssh", "--node_rank=2",
                              "--master_addr=a", "train", "x.yaml"))  # fmt: skip
    assert "names 2, from 0" in said


@has_deepspeed
def test_neither_ranks_nor_hosts(run_script):
    assert "neither a number of ranks nor a host file" in refused(run_script("deepspeed.sh", "hosts", "train", "x.yaml"))


@pytest.mark.parametrize("command", ["train", "eval"])
def test_torchrun_leaves_our_options_to_us(command):
    """Its parser looks at all words, also those behind the module: no option of ours may begin one of its own."""
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    ours = [name for name in commands.choices[command]._option_string_actions if name not in ("-h", "--help")]
    assert len(ours) > 3
    for name in ours:
        found = get_args_parser().parse_args(["--nnodes=2", "-m", "mitrain", command, "x", name])
        assert found.training_script_args == [command, "x", name]


FAKE = """#!/usr/bin/env bash
case $1 in
    -c) exit 0 ;;
    *) printf '%s\\n' "$@"; env | grep -E '^(OMP|MITRAIN_T|DS_)' | sort; if [ -e /dev/fd/9 ]; then sort /dev/fd/9; fi ;;
esac
"""


@pytest.fixture
def handed_on(run_script, tmp_path):
    """What a script hands to the interpreter: its arguments, the environment, the file for the hosts."""
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    pdsh = tmp_path / "pdsh"
    pdsh.write_text("#!/bin/sh\n")
    pdsh.chmod(0o755)

    def run(*arguments: object, **env: str) -> list[str]:
        path = f"{tmp_path}:/usr/bin:/bin"
        done = run_script(*arguments, PYTHON=str(fake), PATH=path, HOME=str(tmp_path), **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_ranks_of_this_machine(handed_on):
    lines = handed_on("local.sh", 2, "train", "c.yaml", "a.b={c: d}", MITRAIN_TIMEOUT="", OMP_NUM_THREADS="3")
    assert "2 -m mitrain train c.yaml a.b={c: d}" in " ".join(lines)
    assert "a.b={c: d}" in lines and {"OMP_NUM_THREADS=3", "MITRAIN_TIMEOUT=1800"} <= set(lines)
    lines = handed_on("deepspeed.sh", 2, "train", "c.yaml", "a.b={c: d}", OMP_NUM_THREADS="", DS_ACCELERATOR="xpu")
    begin = "-m deepspeed.launcher.runner --num_gpus 2 --module mitrain train c.yaml a.b={c: d} "
    assert " ".join(lines).startswith(begin) and "DS_ACCELERATOR=xpu" in lines
    assert any(re.fullmatch("OMP_NUM_THREADS=[1-9][0-9]*", line) for line in lines)


def test_hosts_by_ssh_get_the_environment_and_the_words_as_they_are(handed_on, hosts, tmp_path):
    """The launcher puts words with a blank into double quotes and a shell on the host reads all of them again."""
    (tmp_path / "mine").write_text("OTHER=1\n\n")
    words = ["name=a;b", "task={name: $HOME `x` \\n}", "plain=1"]
    lines = handed_on(
        "deepspeed.sh", hosts, "--master_port", "29511", "train", "c.yaml", *words,
        DS_ENV_FILE=str(tmp_path / "mine"), GLOO_SOCKET_IFNAME="eth7", WANDB_API_KEY="secret",
    )  # fmt: skip
    assert lines[:7] == [
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        str(hosts),
        "--master_port",
        "29511",
        "--module",
    ]
    assert {"OTHER=1", "GLOO_SOCKET_IFNAME=eth7", "OMP_NUM_THREADS=1"} <= set(lines)
    assert "DS_ENV_FILE=/dev/fd/9" in lines and not any("secret" in line for line in lines)
    passed = lines[8 : 8 + 2 + len(words)]
    quoted = " ".join(f'"{word}"' if " " in word else word for word in passed)
    shown = subprocess.run(["bash", "-c", f"printf '%s\\n' {quoted}"], capture_output=True, text=True)
    assert shown.stdout.splitlines() == ["train", "c.yaml", *words]


def test_hosts_without_ssh_get_the_words_untouched(handed_on, hosts):
    options = ["--no_ssh", "--node_rank=1", "--master_addr=a"]
    lines = handed_on("deepspeed.sh", hosts, *options, "train", "c.yaml", "name=a;b")
    assert lines[4:11] == [*options, "--module", "mitrain", "train", "c.yaml"] and lines[11] == "name=a;b"
