"""``mitrain launch slurm``: a job script for a run on several nodes, made of launch/slurm/train.sbatch, is submitted."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mitrain.cli.shared import command, say
from mitrain.core.errors import ConfigError, UserError

PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATE = PACKAGE / "launch" / "slurm" / "train.sbatch"  # launch is a link to the clone's folder, a folder in a wheel
BODY = "set -euo pipefail"
SEEDS = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", re.ASCII)
EXAMPLES = """  mitrain launch slurm quickstart --nodes 2 --time 1:00:00 --dry-run
  mitrain launch slurm quickstart train.steps=1000 --nodes 2 --gpus-per-node 4 --cpus-per-task 8 --time 12:00:00
  mitrain launch slurm quickstart --array 0-4 --time 2:00:00 --sbatch=--partition=short"""


def add_launch(sub: argparse.ArgumentParser) -> None:
    verbs = sub.add_subparsers(dest="verb", required=True, metavar="WHERE")
    slurm = command(verbs, "slurm", run_slurm, "submit a run to Slurm, which saves and resumes on preemption", EXAMPLES)
    slurm.add_argument("config", metavar="CONFIG", help="a YAML file or a shipped configuration's name")
    slurm.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as with mitrain train")
    slurm.add_argument("--nodes", type=int, default=1, metavar="N", help="how many machines")
    slurm.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="GPUs of each machine; each has a rank")
    slurm.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks on each machine, if not one per GPU")
    slurm.add_argument("--cpus-per-task", type=int, metavar="N", help="cores per rank")
    slurm.add_argument(
        "--time", metavar="[D-]HH:MM:SS", help="time limit of the job; a run that reaches it is requeued and goes on"
    )
    slurm.add_argument("--array", metavar="SEEDS", help="a run for each seed: 0-4, or 1,2,7; 0-9%%2 has two at a time")
    slurm.add_argument(
        "--grace", type=int, default=120, metavar="SECONDS", help="how long before the limit the run saves and requeues"
    )
    slurm.add_argument(
        "--run-dir",
        dest="at",
        metavar="RUN_DIR",
        help="the run's folder; with --array -SEED is added (default: runs/slurm-JOB)",
    )
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, e.g. --sbatch=--partition=long",
    )
    slurm.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")


def run_slurm(arguments: argparse.Namespace) -> dict[str, Any]:
    from mitrain.training import schema

    schema.load(arguments.config, arguments.overrides)  # a mistake is told here, and not after hours in the queue
    script = render(arguments)
    if arguments.dry_run:
        say(arguments, script.rstrip())
        return {"job": None, "script": script}
    job = submit(script)
    run = arguments.at or f"runs/slurm-{job}"
    runs = f"{run}{'-' if arguments.at else '_'}SEED" if arguments.array else run
    say(arguments, f"job {job}, run folder {runs}: squeue --job {job}; scancel {job} ends it")
    return {"job": job, "run": runs, "script": script}


def submit(script: str) -> str:
    """The number that Slurm gives the job."""
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: call this where jobs are submitted, or print the script with --dry-run")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses the job ({done.stderr.strip()[:300]}): change the options, or see sinfo")
    return done.stdout.strip().partition(";")[0]  # behind it the cluster's name, where there are several


def render(arguments: argparse.Namespace) -> str:
    """The job script: sbatch's options, what to run, and the body of the template."""
    head, _, body = TEMPLATE.read_text("utf-8").partition(BODY)
    options = dict(
        line.removeprefix("#SBATCH ").partition("=")[::2] for line in head.splitlines() if line.startswith("#SBATCH")
    )
    options |= asked(arguments)
    lines = [f"#SBATCH {name}={value}" if value else f"#SBATCH {name}" for name, value in options.items()]
    if bad := [line for line in lines if len(line.split()) != 2]:
        raise ConfigError(f"sbatch would not read {bad[0]!r} as one option: leave out spaces and line breaks")
    return "\n".join(["#!/usr/bin/env bash", *lines, *setting(arguments), BODY + body])


def asked(arguments: argparse.Namespace) -> Mapping[str, str]:
    """sbatch's options by name."""
    counts = {"--nodes": arguments.nodes, "--ntasks-per-node": arguments.tasks_per_node or arguments.gpus_per_node or 1}
    counts |= {"--gpus-per-node": arguments.gpus_per_node} if arguments.gpus_per_node else {}
    counts |= {"--cpus-per-task": arguments.cpus_per_task} if arguments.cpus_per_task is not None else {}
    for name, value in {**counts, "--grace": arguments.grace}.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: give 1 or more")
    options = {name: str(value) for name, value in counts.items()} | {"--signal": f"B:USR1@{arguments.grace}"}
    options |= {"--time": arguments.time} if arguments.time else {}
    if arguments.array:
        if not SEEDS.fullmatch(arguments.array):
            raise ConfigError(f"--array {arguments.array[:40]!r} lists no seeds: give 0-4, or 1,2,7")
        options |= {"--array": arguments.array, "--output": "slurm-%A_%a.log"}
    for option in arguments.sbatch:
        if not option.startswith("--"):
            raise ConfigError(f"--sbatch {option[:40]!r} is no option of sbatch: write it as --sbatch=--partition=long")
        name, _, value = option.partition("=")
        options[name] = value
    return options


def setting(arguments: argparse.Namespace) -> list[str]:
    """Lines of shell that say what the body runs: the interpreter, this package, and the arguments of ``train``."""
    if arguments.array and any(word.startswith("seed=") for word in arguments.overrides):
        raise ConfigError("--array gives each run its seed: leave out seed=…")
    config = Path(arguments.config)
    words = [str(config.absolute()) if config.is_file() else arguments.config, *arguments.overrides]
    seed = ' "seed=$SLURM_ARRAY_TASK_ID"' if arguments.array else ""
    run = shlex.quote(str(Path(arguments.at).absolute())) if arguments.at else ""
    return [
        f"export MITRAIN_ROOT={shlex.quote(str(PACKAGE))} PYTHON={shlex.quote(sys.executable)}",
        *([f"export RUN={run}{'-$SLURM_ARRAY_TASK_ID' if arguments.array else ''}"] if run else []),
        f"set -- {shlex.join(words)}{seed}",
    ]
