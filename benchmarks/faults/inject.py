"""What happens inside a process that is to fail, set off by a counted call and never by time.

An injection is a function of this module, named with its arguments by the case; it is called in the new process before
the command runs. Every one calls `fired` when the fault takes place, which leaves the moment in a file.
"""

import functools
import importlib
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIRED = "MITRAIN_FAULT_FIRED"


def fired() -> None:
    """Note that the fault takes place now (CLOCK_MONOTONIC, which all processes of a machine share)."""
    path = os.environ[FIRED]
    with open(path, "w", encoding="utf-8") as file:
        file.write(repr(time.monotonic()))
        file.flush()
        os.fsync(file.fileno())


def before(owner: Any, name: str, call: int, act: Callable[[], object]) -> None:
    """Let ``act()`` come before the CALL-th call of ``owner.name``, counted from 1."""
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def before_step(step: int, act: Callable[[], object]) -> None:
    from mitrain.training.trainer import Trainer

    before(Trainer, "_step", step, lambda: (fired(), act()))


def send(step: int, name: str) -> None:
    """The process gets the signal ``name`` before its STEP-th step."""
    before_step(step, lambda: os.kill(os.getpid(), signal.Signals[name]))


def send_before(place: str, call: int, name: str) -> None:
    """The process gets the signal ``name`` before the CALL-th call of ``place``, as "mitrain.training.checkpoint:save"."""
    module, _, path = place.partition(":")
    *owners, last = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    before(owner, last, call, lambda: (fired(), os.kill(os.getpid(), signal.Signals[name])))


def kill_in_save(save: int, operation: int) -> None:
    """The process is killed in its SAVE-th save, before the OPERATION-th call that changes a file."""
    from mitrain.training import checkpoint

    def arm() -> None:
        calls = []

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
            if writing or event in ("os.rename", "os.remove", "os.mkdir", "os.chmod"):
                calls.append(event)
                if len(calls) == operation:
                    fired_quietly()
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)

    before(checkpoint, "save", save, arm)


def fired_quietly() -> None:
    """`fired` from within an audit hook: by system calls, which the hook does not see again as Python's open."""
    file = os.open(os.environ[FIRED], os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(file, repr(time.monotonic()).encode())
    os.close(file)


def full_disk(step: int, limit: int = 4096) -> None:
    """From the STEP-th step on no file may grow beyond ``limit`` bytes."""

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    before_step(step, fill)


def poison(step: int, what: str) -> None:
    """One trained number (``weight``) or one of the optimizer's (``moment``) becomes infinite before the STEP-th step."""
    from mitrain.training.trainer import Trainer

    original, calls = Trainer._step, []

    def poisoned(trainer: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            fired()
            weight = next(iter(trainer.model.trainable["adapter"].parameters())).data
            moments = next(iter(trainer.engine.optimizer.state.values()))
            (weight if what == "weight" else moments["exp_avg_sq"]).view(-1)[0] = float("inf")
        return original(trainer)

    Trainer._step = poisoned


def out_of_memory(step: int) -> None:
    """The STEP-th step asks for more memory than there is."""

    def ask() -> None:
        raise MemoryError

    before_step(step, ask)


def copied(step: int, source: str, target: str) -> None:
    """A file takes another's place before the STEP-th step."""
    before_step(step, lambda: shutil.copyfile(source, target))


def moved(step: int, source: str, target: str) -> None:
    """A folder gets another name before the STEP-th step."""
    before_step(step, lambda: os.rename(source, target))


def cut(step: int, pattern: str, below: str) -> None:
    """Every file ``below`` that fits ``pattern`` loses its second half before the STEP-th step."""

    def halve() -> None:
        for path in Path(below).rglob(pattern):
            os.truncate(path, path.stat().st_size // 2)

    before_step(step, halve)


def mounted(source: str, target: str) -> None:
    """This process alone finds the folder ``source`` at ``target``, in a mount namespace of its own, if it may have one."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, bind, private = 0x20000, 0x10000000, 4096, (1 << 18) | 16384
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        return
    libc.mount(b"none", b"/", None, private, None)
    if not libc.mount(source.encode(), target.encode(), None, bind, None):
        fired()


def replaced_while_read(target: str, source: str) -> None:
    """``target`` is overwritten by ``source`` when pictures have been read and none is encoded."""
    from mitrain.data.features import EncoderFeatures

    before(EncoderFeatures, "encode", 1, lambda: (fired(), shutil.copyfile(source, target)))


def no_gradient() -> None:
    """Every loss is NaN."""
    from mitrain.training.trainer import Trainer

    original = Trainer.loss

    def spoilt(trainer: Any, batch: Any) -> Any:
        fired()
        total, count = original(trainer, batch)
        return total * float("nan"), count

    Trainer.loss = spoilt
