"""Faults of several processes: one dies, falls silent, differs from the others, or never comes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import world
from benchmarks.faults.lab import LIMIT_S, Ended, Lab, Left, Process, moment
from benchmarks.faults.suite import Found, fault, refused_at_start, resumed_on

RANKS = 2


def fail_one(lab: Lab, case: Path, rank: int, *injection: object, timeout: str = "30") -> tuple[Found, list[Process]]:
    """RANK fails; the other one must end in a line, and both go on from what is there."""
    run, fired = case / "run", case / "fired"
    argv = [["train", lab.world / "config.yaml", "--run-dir", run]] * RANKS
    processes = lab.start_ranks(argv, inject={rank: injection}, fired=fired, MITRAIN_TIMEOUT=timeout)
    other = processes[1 - rank].wait()
    when = moment(fired)
    detected = None if when is None else processes[1 - rank].started + other.seconds - when
    processes[rank].kill()
    last = Left.of(run)
    lost = max(last.losses, default=0) - last.step
    again = resumed_on(RANKS, lab, run, ())
    equal = again.code == 0 and Left.of(run).equals(lab.undisturbed(RANKS))
    said = " / ".join(other.lines[:2])
    return Found(when is not None, other.state, detected, lost, equal, said), processes


@fault("refused", most_lost=world.EVERY - 1, quick=True)
def rank_killed(lab: Lab, case: Path) -> Found:
    return fail_one(lab, case, 1, "send", 6, "SIGKILL")[0]


@fault("refused", most_lost=world.EVERY - 1)
def rank_0_killed(lab: Lab, case: Path) -> Found:
    return fail_one(lab, case, 0, "send", 6, "SIGKILL")[0]


@fault("refused", most_lost=world.EVERY - 1)
def rank_silent(lab: Lab, case: Path) -> Found:
    return fail_one(lab, case, 1, "send", 6, "SIGSTOP", timeout="8")[0]


@fault("refused", most_lost=world.EVERY - 1)
def rank_out_of_memory(lab: Lab, case: Path) -> Found:
    found, processes = fail_one(lab, case, 1, "out_of_memory", 6)
    failed = processes[1].wait()
    if failed.state != "refused":
        found.end_state = f"rank 1: {failed.state}"
    return found


@fault("went on")
def one_rank_is_asked_to_stop(lab: Lab, case: Path) -> Found:
    """Both save after the same step."""
    return fail_one(lab, case, 1, "send", 6, "SIGTERM")[0]


def refused_on_both(ended: list[Ended], *needles: str) -> Found:
    """Every rank is refused in one line."""
    found = [refused_at_start(e, *needles) for e in ended]
    bad = next((f for f in found if f.end_state != "refused"), found[0])
    bad.detected_s = max(e.seconds for e in ended)
    return bad


def differing(lab: Lab, case: Path, change: Callable[[Path], object], *needles: str) -> Found:
    """Rank 1 finds something else under the same paths, as on a machine with a disk of its own; refused before a step."""
    run, here = case / "run", lab.other_world(case)
    change(here)
    argv = [["train", lab.world / "config.yaml", "--run-dir", run]] * RANKS
    started = lab.start_ranks(argv, inject={1: ("mounted", str(here), str(lab.world))}, fired=case / "fired")
    found = refused_on_both([p.wait() for p in started], "rank", *needles)
    found.fired = (case / "fired").exists()
    metrics = run / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        found.end_state = "took a step"
    return found


@fault("refused", quick=True)
def rank_with_other_answers(lab: Lab, case: Path) -> Found:
    """The same ids, another answer."""
    return differing(lab, case, answers)


@fault("refused")
def rank_with_other_pictures(lab: Lab, case: Path) -> Found:
    return differing(lab, case, picture)


@fault("refused")
def rank_with_another_base(lab: Lab, case: Path) -> Found:
    return differing(lab, case, base)


@fault("refused")
def rank_with_other_arguments(lab: Lab, case: Path) -> Found:
    run = case / "run"
    argv = [["train", lab.world / "config.yaml", f"train.lr={rate}", "--run-dir", run] for rate in (0.01, 0.02)]
    found = refused_on_both([p.wait() for p in lab.start_ranks(argv)], "rank")
    if (run / "metrics.jsonl").exists():
        found.end_state = "took a step"
    return found


def answers(here: Path) -> None:
    file = here / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[0]["answer"] = "blue" if rows[0]["answer"] != "blue" else "red"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def picture(here: Path) -> None:
    world.picture("red", 99).save(here / "data" / "images" / "3.png")


def base(here: Path) -> None:
    world.language_model(here / "llm", seed=1)


@fault("refused", quick=True)
def rank_with_another_split(lab: Lab, case: Path) -> Found:
    """``eval --split`` differs: no score of two splits together."""
    run = case / "run"
    argv = [["train", lab.world / "config.yaml", "train.steps=2", "--run-dir", run]] * RANKS
    trained = [p.wait() for p in lab.start_ranks(argv)]
    if any(e.code for e in trained):
        raise RuntimeError(trained[0].err[-500:])
    argv = [["eval", run, "--split", split, "--json"] for split in ("val", "test")]
    return refused_on_both([p.wait() for p in lab.start_ranks(argv)], "split")


@fault("refused")
def nobody_answers_at_the_meeting_place(lab: Lab, case: Path) -> Found:
    """Something that says nothing listens on MASTER_PORT; given up after the time-out and little more."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1]), "WORLD_SIZE": "2"}
        command = ("train", lab.world / "config.yaml", "--run-dir", case / "run")
        ended = lab.run(*command, RANK="1", LOCAL_RANK="1", MITRAIN_TIMEOUT="5", **meet)
    found = refused_at_start(ended)
    if found.end_state == "refused" and ended.seconds > 30:
        found.end_state = "late"
    return found


@fault("ended", most_lost=world.STEPS)
def agent_killed(lab: Lab, case: Path) -> Found:
    """``kill -9`` of torchrun: its ranks end too, and a new start goes on from what they saved."""
    run, config = case / "run", lab.world / "config.yaml"
    many = ["train.steps=100000", "train.save_every=50", "train.eval_every=100000", "train.keep=1"]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS),
             "-m", "mitrain", "train", str(config), *many, "--run-dir", str(run)]  # fmt: skip
    env = {**os.environ, "MITRAIN_CACHE": str(lab.folder / "cache"), "OMP_NUM_THREADS": "1"}
    with open(case / "err", "wb") as err:
        agent = subprocess.Popen(words, env=env, stdout=err, stderr=err, start_new_session=True)
    ranks: list[int] = []
    try:
        until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 2000)
        ranks = children(agent.pid)
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        start = time.monotonic()
        gone = until(lambda: not any(alive(pid) for pid in ranks), limit_s=60, give_up=False)
        return Found(len(ranks) == RANKS, "ended" if gone else "went on alone", time.monotonic() - start)
    finally:
        for pid in (agent.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def until(holds, limit_s: float = LIMIT_S, give_up: bool = True) -> bool:
    end = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end:
            if give_up:
                raise RuntimeError(f"nothing happened in {limit_s:g} s")
            return False
        time.sleep(0.1)
    return True


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
