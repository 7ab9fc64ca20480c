"""A signal in every phase of every command, as whole processes: one line, 128 + its number, nothing half made; what is
started again equals an undisturbed run. After the first step `train` saves instead, and ends with 75, or 130 after
Ctrl-C."""

import signal

import pytest

from benchmarks.faults.lab import Left, opened
from mitrain.training import state

BEFORE = {
    "loading": ("mitrain.training.trainer:Trainer._build", 1, "SIGTERM"),
    "a segment of the cache": ("mitrain.core.files:os.replace", 3, "SIGUSR1"),
}
DURING = {
    "a save": ("mitrain.training.checkpoint:save", 1, "SIGHUP"),
}
COMMANDS = {
    "eval": (["eval", "RUN"], "mitrain.inference.scoring:score_split", "SIGTERM"),
    "predict": (["predict", "RUN", "--image", "PICTURE", "--text", "red"], "mitrain.training.runs:build", "SIGHUP"),
    "export": (["export", "RUN", "--out", "OUT"], "mitrain.core.files:fsync_path", "SIGTERM"),
    "report": (["report", "RUN", "--out", "OUT"], "mitrain.core.files:write_atomic", "SIGUSR1"),
    "models prepare": (["models", "prepare", "dinov2-vits14"], "mitrain_demo.packages:run_client", "SIGINT"),
}


@pytest.fixture(scope="module")
def lab():
    with opened() as lab:
        yield lab


def train(lab, case, *injection):
    words = ("train", lab.world / "config.yaml", "--run-dir", case / "run")
    cache = str(case / "cache")
    return lab.start(*words, inject=injection or None, fired=case / "fired", MITRAIN_CACHE=cache).wait()


def hidden(case) -> list[str]:
    """What half-made files and folders, and markers, are named."""
    return [str(path.relative_to(case)) for path in case.rglob(".*")]


@pytest.mark.parametrize("phase", [*BEFORE, *DURING])
def test_train(lab, phase):
    place, call, name = {**BEFORE, **DURING}[phase]
    case = lab.scratch(phase)
    ended = train(lab, case, "send_before", place, call, name)
    assert (case / "fired").exists() and hidden(case) == []
    if phase in BEFORE:
        assert (ended.code, ended.lines[-1]) == (128 + signal.Signals[name], f"mitrain: stopped by {name}")
        assert sorted(path.name for path in (case / "run").iterdir()) == ["config.yaml", "state.json"]
        told = state.read(case / "run")
        assert (told["state"], told["why"], told["exit_code"]) == ("preempted", name, ended.code)
    else:
        assert f"stopped by {name} after step" in ended.out and "mitrain train --resume" in ended.out
        assert ended.code == (130 if name == "SIGINT" else 75)
    again = train(lab, case)
    assert again.code == 0 and Left.of(case / "run").equals(lab.undisturbed())


@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands(lab, command):
    words, place, name = COMMANDS[command]
    lab.undisturbed()
    case = lab.scratch(command)
    places = {"RUN": lab.folder / "undisturbed-1", "OUT": case / "out", "PICTURE": lab.world / "data/images/0.png"}
    words, cache = [places.get(word, word) for word in words], str(case / "cache")
    process = lab.start(*words, inject=("send_before", place, 1, name), fired=case / "fired", MITRAIN_CACHE=cache)
    ended = process.wait()
    assert (case / "fired").exists() and (ended.code, ended.out) == (128 + signal.Signals[name], "")
    assert ended.lines[-1] == f"mitrain: stopped by {name}" and "Traceback" not in ended.err
    assert hidden(case) == [] and not (case / "out").exists()


STUCK = """
import os, signal, time


def Settings(**_):
    pass


class Run:
    def log(self, *_, **__):
        pass

    def finish(self):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)


def init(**_):
    return Run()
"""


def test_a_finished_run_is_written_before_wandb_is_waited_for(lab):
    """The signal comes while wandb finishes: the wait is cut short, and the run is whole."""
    case = lab.scratch("wandb")
    (case / "wandb.py").write_text(STUCK)
    options = ("telemetry.trackers=[wandb]", "wandb.mode=offline", "--run-dir", case / "run")
    words = ("train", lab.world / "config.yaml", *options)
    process = lab.start(
        *words, inject=("send_before", "mitrain.training.telemetry:Metrics.close", 1, "SIGKILL"), PYTHONPATH=str(case)
    )
    assert process.wait().code == -signal.SIGKILL and (case / "run" / "summary.json").exists()
    ended = lab.start(*words[:-1], case / "again", PYTHONPATH=str(case)).wait()
    assert ended.code == 0 and "best val" in ended.out and "it has not finished in 5 s" in ended.lines[-1]
    assert Left.of(case / "again").equals(lab.undisturbed())
