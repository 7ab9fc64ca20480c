"""Run folders that are not as their run left them: damaged checkpoints, other data, other settings, two owners."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from benchmarks.faults import world
from benchmarks.faults.lab import LIMIT_S, Lab, Left
from benchmarks.faults.suite import Found, fault, refused_at_start
from mitrain.core import prepared
from mitrain.core.errors import PREEMPTED
from mitrain.core.files import file_lock
from mitrain.training.checkpoint.manifest import checksum

STOP = 6


def stopped(lab: Lab, case: Path, config: Path | None = None) -> Path:
    """A run that was asked to stop after five of its steps and saved."""
    run = case / "run"
    ended = lab.run("train", config or lab.world / "config.yaml", "--run-dir", run, inject=("send", STOP, "SIGTERM"))
    if ended.code != PREEMPTED or Left.of(run).step != STOP:
        raise RuntimeError(f"the run did not stop after {STOP} steps: {ended.err[-500:]}")
    return run


def refused_resume(lab: Lab, run: Path, mend: Callable[[], object], *needles: str, notices: int = 0) -> Found:
    """Resume is refused and touches nothing; with the fault mended it goes on to the undisturbed end."""
    before = (run / "metrics.jsonl").read_bytes()
    found = refused_at_start(lab.run("train", "--resume", run), *needles, notices=notices)
    if (run / "metrics.jsonl").read_bytes() != before:
        found.end_state = "cut metrics.jsonl"
    mend()
    again = lab.run("train", "--resume", run)
    found.resumed_equal = again.code == 0 and Left.of(run).equals(lab.undisturbed())
    found.lost_steps = 0
    return found


@fault("went on", most_lost=world.EVERY, quick=True)
def newest_checkpoint_damaged(lab: Lab, case: Path) -> Found:
    """The one before it is taken, and said so."""
    run = stopped(lab, case)
    path = sorted((run / "checkpoints").glob("step-*"))[-1] / "adapter.safetensors"
    flip(path)
    lost = STOP - Left.of(run).step
    ended = lab.run("train", "--resume", run)
    equal = ended.code == 0 and Left.of(run).equals(lab.undisturbed())
    state = ended.state if path.parent.name in ended.err else "silent"
    return Found(True, state, ended.seconds, lost, equal, " / ".join(ended.lines[:1]))


def flip(path: Path, at: int = -5) -> None:
    """One bit of a byte, counted from the end."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@fault("refused")
def every_checkpoint_damaged(lab: Lab, case: Path) -> Found:
    """Not begun anew at step 0, and metrics.jsonl keeps its lines."""
    run = stopped(lab, case)
    paths = [folder / "adapter.safetensors" for folder in (run / "checkpoints").glob("step-*")]
    for path in paths:
        flip(path)
    return refused_resume(lab, run, lambda: [flip(path) for path in paths], "checkpoint", notices=2)


@fault("refused", quick=True)
def answers_changed(lab: Lab, case: Path) -> Found:
    """The same ids and as many of them, with other answers."""
    here = lab.other_world(case)
    run, file = stopped(lab, case, here / "config.yaml"), here / "data" / "train.jsonl"
    text = file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    colours = list(world.COLOURS)
    for row in rows:
        row["answer"] = colours[(colours.index(row["answer"]) + 1) % 4]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return refused_resume(lab, run, lambda: file.write_text(text, encoding="utf-8"), "train")


@fault("refused")
def pictures_changed(lab: Lab, case: Path) -> Found:
    here = lab.other_world(case)
    run, file = stopped(lab, case, here / "config.yaml"), here / "data" / "images" / "3.png"
    content, stamp = file.read_bytes(), file.stat()
    world.picture("red", 99).save(file)

    def mend() -> None:
        file.write_bytes(content)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    return refused_resume(lab, run, mend)


@fault("refused")
def settings_edited(lab: Lab, case: Path) -> Found:
    """Learning rate and seed in config.yaml: both are named."""
    run = stopped(lab, case)
    file = run / "config.yaml"
    text = file.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    values["train"]["lr"], values["seed"] = 0.5, 7
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return refused_resume(lab, run, lambda: file.write_text(text, encoding="utf-8"), "lr", "seed")


@fault("refused")
def base_weights_changed(lab: Lab, case: Path) -> Found:
    """Another language model of the same shape."""
    here = lab.other_world(case)
    run = stopped(lab, case, here / "config.yaml")
    file = here / "llm" / "model.safetensors"
    content = file.read_bytes()
    world.language_model(here / "llm", seed=1)
    return refused_resume(lab, run, lambda: file.write_bytes(content))


@fault("refused", quick=True)
def two_jobs_in_one_folder(lab: Lab, case: Path) -> Found:
    """The second one stops in a line while the first, which is held still in its sixth step, goes on to its end."""
    run, fired = case / "run", case / "fired"
    arguments = ("train", lab.world / "config.yaml", "--run-dir", run)
    first = lab.start(*arguments, inject=("send", STOP, "SIGSTOP"), fired=fired)
    while not fired.exists():
        time.sleep(0.05)
    found = refused_at_start(lab.run(*arguments), str(first.pid))
    first.send(signal.SIGCONT)
    ended = first.wait()
    found.lost_steps, found.resumed_equal = 0, ended.code == 0 and Left.of(run).equals(lab.undisturbed())
    return found


@fault("obeyed")
def lock_held_by_a_stopped_process(lab: Lab, case: Path) -> Found:
    """It is said who is waited for, and SIGTERM ends the waiting."""
    target = prepared.folder_of("data", prepared.recipes("data")["digits"], seed=0)
    with file_lock(case / "cache" / "data" / f".{target.name}.held"):
        process = lab.start("data", "prepare", "digits", MITRAIN_CACHE=str(case / "cache"))
        deadline = time.monotonic() + LIMIT_S
        while "waiting for" not in process.said("err") and time.monotonic() < deadline:
            time.sleep(0.1)
        start = time.monotonic()
        process.send(signal.SIGTERM)
        ended = process.wait()
    named = f"process {os.getpid()}" in ended.err
    state = "hung" if ended.code is None else "obeyed" if named else "silent"
    return Found(True, state, time.monotonic() - start, said=" / ".join(ended.lines[:1]))


@fault("refused")
def checkpoints_gone(lab: Lab, case: Path) -> Found:
    """Resume is not a new start on top of the old numbers."""
    run = stopped(lab, case)
    away = case / "checkpoints"
    shutil.move(run / "checkpoints", away)
    return refused_resume(lab, run, lambda: shutil.move(away, run / "checkpoints"), "checkpoint")


@fault("went on", most_lost=world.EVERY)
def newest_checkpoint_not_finite(lab: Lab, case: Path) -> Found:
    """Signed like a good one, and yet not taken: the one before is."""
    run = stopped(lab, case)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    spoil(newest)
    ended = lab.run("train", "--resume", run)
    equal = ended.code == 0 and Left.of(run).equals(lab.undisturbed())
    state = ended.state if "not finite" in ended.err and newest.name in ended.err else "silent"
    return Found(True, state, ended.seconds, world.EVERY, equal, " / ".join(ended.lines[:1]))


def spoil(folder: Path) -> None:
    """A checkpoint with a NaN in it and checksums that agree."""
    file, manifest = folder / "adapter.safetensors", folder / "manifest.json"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    values = json.loads(manifest.read_text(encoding="utf-8"))
    content = file.read_bytes()
    values["files"][file.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    values.pop("checksum")
    values["checksum"] = checksum(values)
    manifest.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
