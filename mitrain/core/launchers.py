"""A rank ends with its launcher: one that is killed cannot end its ranks, and they would train on beside the next start.

The launchers (torchrun's agent, deepspeed's two processes, Slurm's step) are found among this process's ancestors when it
starts; a process that nobody launched watches nobody, so that what runs under nohup goes on.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PERIOD_S = 0.5
MODULES = ("torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.runner", "deepspeed.launcher.launch")
PROGRAMS = ("torchrun", "deepspeed", "accelerate", "slurmstepd:")
LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # set by torchrun's library and by deepspeed for the ranks they start


@dataclass(frozen=True)
class Process:
    """A process of this machine: a pid alone may come to name another."""

    pid: int
    started: bytes

    def alive(self) -> bool:
        state = status(self.pid)
        return state is not None and state[1:] == (self.started, True)


def status(pid: int) -> tuple[int, bytes, bool] | None:
    """Parent, start and whether it runs; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[1]), fields[19], fields[0] not in (b"Z", b"X")


def launchers(env: Mapping[str, str] = os.environ) -> list[Process]:
    """The launchers among this process's ancestors, the nearest first; none where there is no /proc."""
    above = list(ancestors(os.getpid()))
    named = [i for i, process in enumerate(above) if is_launcher(words(process.pid))]
    if any(name in env for name in LAUNCHED) and 0 not in named:
        named = [0, *named]
    return [above[i] for i in named if i < len(above)]


def ancestors(pid: int) -> Iterator[Process]:
    state = status(pid)
    while state and state[0] > 1:
        parent = state[0]
        state = status(parent)
        if state:
            yield Process(parent, state[1])


def words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return []


def is_launcher(command: list[str]) -> bool:
    """Whether a command line is a launcher's own: its program, or the script or module that Python runs."""
    start = command[:5]
    programs = [os.path.basename(word) for word in [start[0].split(" ")[0], *start[1:]]] if start else []
    modules = [module for option, module in pairwise(start) if option == "-m"]
    return not {*PROGRAMS}.isdisjoint(programs) or not {*MODULES}.isdisjoint(modules)


def end_with_launcher() -> None:
    """Have this process killed when a launcher of it ends, as the launcher's own death would have been its end."""
    watched = launchers()
    if watched:
        threading.Thread(target=watch, args=(watched,), daemon=True).start()


def watch(processes: list[Process]) -> None:
    while all(process.alive() for process in processes):
        time.sleep(PERIOD_S)
    with suppress(OSError):  # the terminal may have gone with it
        os.write(2, b"mitrain: the launcher has ended, and this rank with it: start it again to resume\n")
    os.kill(os.getpid(), signal.SIGKILL)  # the main thread may be anywhere; a run is resumed as after any kill
