"""Faults in the middle of training: signals, kills, disks, numbers."""

from pathlib import Path

from benchmarks.faults.lab import Lab, Left
from benchmarks.faults.suite import Found, fault, interrupted
from benchmarks.faults.world import EVERY
from mitrain.training import checkpoint


def interrupt(lab: Lab, case: Path, *injection: object, **env: str) -> Found:
    run, fired = case / "run", case / "fired"
    process = lab.start("train", lab.world / "config.yaml", "--run-dir", run, inject=injection, fired=fired, **env)
    return interrupted(process, fired, run, lab)


@fault("SIGKILL", most_lost=EVERY - 1, quick=True)
def kill_in_a_step(lab: Lab, case: Path) -> Found:
    return interrupt(lab, case, "send", 6, "SIGKILL")


@fault("SIGKILL", most_lost=EVERY)
def kill_in_a_save(lab: Lab, case: Path) -> Found:
    return interrupt(lab, case, "kill_in_save", 2, 6)


@fault("went on", quick=True)
def sigterm(lab: Lab, case: Path) -> Found:
    return interrupt(lab, case, "send", 6, "SIGTERM")


@fault("went on")
def sighup(lab: Lab, case: Path) -> Found:
    return interrupt(lab, case, "send", 6, "SIGHUP")


@fault("went on")
def sigusr1(lab: Lab, case: Path) -> Found:
    return interrupt(lab, case, "send", 6, "SIGUSR1")


@fault("refused", most_lost=EVERY)
def full_disk(lab: Lab, case: Path) -> Found:
    return interrupt(lab, case, "full_disk", 6)


@fault("refused", most_lost=EVERY)
def out_of_memory(lab: Lab, case: Path) -> Found:
    return interrupt(lab, case, "out_of_memory", 6)


@fault("finite", most_lost=3 * EVERY, quick=True)
def weight_turns_infinite(lab: Lab, case: Path) -> Found:
    """Nothing that is not finite is published, the run fails, and the last good checkpoint goes on to the same end."""
    found = interrupt(lab, case, "poison", 5, "weight")
    return finite(found, case / "run")


@fault("finite")
def rate_too_high(lab: Lab, case: Path) -> Found:
    run = case / "run"
    changes = ("train.lr=1e38", "train.optimizer.clip=null")
    ended = lab.run("train", lab.world / "config.yaml", *changes, "--run-dir", run)
    found = Found(True, ended.state, ended.seconds, said=" / ".join(ended.lines[:2]))
    return finite(found, run)


def finite(found: Found, run: Path) -> Found:
    """ "finite" where the command failed and every published checkpoint holds numbers only."""
    if found.end_state == "refused" or found.end_state.startswith("code"):
        published = (checkpoint.load(path) for path in (run / "checkpoints").glob("step-*"))
        numbers = (t for saved in published for named in saved.tensors.values() for t in named.values())
        found.end_state = "finite" if all(t.isfinite().all() for t in numbers if t.is_floating_point()) else "published"
    return found


@fault("refused", most_lost=EVERY)
def run_folder_moved(lab: Lab, case: Path) -> Found:
    """Noticed and named at the next write; the folder is not made anew, and the moved one goes on."""
    run, away, fired = case / "run", case / "away", case / "fired"
    injection = ("moved", 6, str(run), str(away))
    process = lab.start("train", lab.world / "config.yaml", "--run-dir", run, inject=injection, fired=fired)
    ended = process.wait()
    state = "made anew" if run.exists() else ended.state
    lost = 5 - Left.of(away).step
    again = lab.run("train", "--resume", away)
    equal = again.code == 0 and Left.of(away).equals(lab.undisturbed())
    return Found(fired.exists(), state, None, lost, equal, " / ".join(ended.lines[:2]))


@fault("went on")
def wandb_hangs(lab: Lab, case: Path) -> Found:
    return beside(lab, case, "time.sleep(600)")


@fault("went on")
def wandb_ends_the_process(lab: Lab, case: Path) -> Found:
    return beside(lab, case, "sys.exit()")


def beside(lab: Lab, case: Path, how: str) -> Found:
    """Telemetry that fails costs nothing: the run ends well, with the same numbers, and what is lost is said once."""
    run, fired = case / "run", case / "fired"
    (case / "wandb.py").write_text(STAND_IN.format(fired=str(fired), how=how), encoding="utf-8")
    options = ("telemetry.trackers=[wandb]", "wandb.mode=offline")
    ended = lab.run("train", lab.world / "config.yaml", *options, "--run-dir", run, PYTHONPATH=str(case))
    equal = ended.code == 0 and Left.of(run).equals(lab.undisturbed())
    lines = [line for line in ended.lines if "wandb" in line]
    state = ended.state if len(lines) == 1 else f"said {len(lines)} times"
    return Found(fired.exists(), state, ended.seconds, 0, equal, " / ".join(lines[:1]))


STAND_IN = """
import pathlib, sys, time


class Run:
    def log(self, *_, **__):
        pathlib.Path({fired!r}).write_text("0")
        {how}

    def finish(self):
        pass


def init(*_, **__):
    return Run()


def Settings(**_):
    return Run()
"""


@fault("finite", most_lost=EVERY)
def moment_turns_infinite(lab: Lab, case: Path) -> Found:
    """A number of the optimizer's state, with which a weight would never move again."""
    return finite(interrupt(lab, case, "poison", 5, "moment"), case / "run")


@fault("refused")
def no_step_is_applied(lab: Lab, case: Path) -> Found:
    """Every gradient is skipped: a failed run, without a summary."""
    run, fired = case / "run", case / "fired"
    ended = lab.start("train", lab.world / "config.yaml", "--run-dir", run, inject=("no_gradient",), fired=fired).wait()
    state = "published" if (run / "summary.json").exists() else ended.state
    return Found(fired.exists(), state, ended.seconds, said=" / ".join(ended.lines[-1:]))
