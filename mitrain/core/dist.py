"""Several processes that train one model: which rank each has, and what they tell one another.

A process that nobody launched in company is rank 0 of 1; every function here is then the identity and no process group
exists. Collectives are called by all ranks in the same order; a rank that ends or falls silent is a RankError on the
others, after at most ``$MITRAIN_TIMEOUT`` seconds (1800), after the first step of training ``$MITRAIN_STEP_TIMEOUT`` (600).
"""

import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from mitrain.core.errors import RankError, UserError
from mitrain.core.version import require_torch
from mitrain.core.waiting import timeout, within

require_torch(torch.__version__)  # every part that computes imports this module
T = TypeVar("T")

_store: distributed.Store | None = None
"""Where the ranks have met; a rank may read it while a collective hangs."""
_meetings = count()

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # torchrun and the deepspeed launcher
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
STEP_S = 600.0  # for which a rank may fall silent after the first step
GRACE_S = 5.0  # beyond the timeout, in which torch may say itself why ranks do not meet
ALIKE_S, POLL_S = 5.0, 0.05  # in which ranks that fail alike find so, and how often they look
HOW = "start the ranks with torchrun, deepspeed or srun, or unset them all"


@dataclass(frozen=True)
class RankInfo:
    """A process among ``world``; ``local`` counts those of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def rank_info(env: Mapping[str, str] = os.environ) -> RankInfo:
    """This process's place by its environment; RankError where that is half set or contradicts itself.

    srun sets its variables for every task, so they count only where the ranks are told where to meet; without that,
    several tasks of one step are refused (each would train alone).
    """
    names = names_set(env)
    if not names:
        return RankInfo()
    info = RankInfo(*(number(env, name) for name in names))
    if not 0 <= info.rank < info.world or not 0 <= info.local <= info.rank:
        shown = " ".join(f"{name}={env[name]}" for name in names)
        raise RankError(f"no rank has {shown}: {HOW}")
    if info.world > 1:
        for name in MEETING:
            required(env, name)
        number(env, "MASTER_PORT")
    return info


def names_set(env: Mapping[str, str]) -> tuple[str, ...]:
    if any(name in env for name in LAUNCHED):
        return LAUNCHED
    named = "SLURM_PROCID" in env and ("MASTER_ADDR" in env or "SLURM_STEP_ID" in env)
    return SRUN if named else ()


def required(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        given = ", ".join(n for n in (*LAUNCHED, *SRUN, *MEETING) if n in env)
        raise RankError(f"the environment sets {given} but not {name}: {HOW}")
    return env[name]


def number(env: Mapping[str, str], name: str) -> int:
    value = required(env, name)
    if not value.isdecimal():
        raise RankError(f"{name}={value[:40]} is not a number: {HOW}")
    return int(value)


@contextmanager
def process_group() -> Iterator[RankInfo]:
    """Join the other ranks, if there are any, for the length of the block."""
    here = rank_info()
    if here.world == 1 or world() > 1:
        yield here
        return
    store = join(here)
    try:
        yield here
    except (UserError, OSError) as error:
        # What rank 0 raised in `from_main` has been reported, and of lost or unlike ranks each speaks for itself.
        if not (hasattr(error, "reported") or isinstance(error, RankError)):
            error.reported = reported_by_main(store, here, str(error))
        raise
    distributed.destroy_process_group()  # not after an exception: the others may be in the middle of a collective


def reported_by_main(store: distributed.Store, here: RankInfo, text: str) -> bool:
    """Whether rank 0 fails with the same ``text`` and so says it for this rank; False on rank 0.

    No collective, as the others may be in one or gone. A rank that nobody joins in this goes on after ``ALIKE_S``; rank 0
    stays as long, since the store may be its own.
    """
    heard = [f"heard/{rank}" for rank in range(1, here.world)]
    with suppress(RuntimeError):  # the store has gone with its process
        if here.rank == 0:
            store.set("failed", text)
            come(store, heard)
        elif come(store, ["failed"]):
            same = store.get("failed") == text.encode()
            store.set(heard[here.rank - 1], "")
            return same
    return False


def come(store: distributed.Store, names: list[str]) -> bool:
    """Whether ``names`` are in the store within ``ALIKE_S``; torch's own waiting fills the terminal where they are not."""
    end = time.monotonic() + ALIKE_S
    while not (arrived := store.check(names)) and time.monotonic() < end:
        time.sleep(POLL_S)
    return arrived


def join(here: RankInfo) -> distributed.Store:
    """Make the process group: gloo for tensors on the CPU, nccl for those on a GPU, which becomes the current one."""
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(here.local % gpus)
    seconds = timeout()
    try:
        # A listener on the port that never speaks holds a rank in torch's own call, beyond its timeout.
        store = within(seconds + GRACE_S, lambda: meet(here, seconds))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=store,
            rank=here.rank,
            world_size=here.world,
            timeout=timedelta(seconds=seconds),
        )
        global _store
        _store = store
        return store
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise RankError(why_apart(str(error), here, seconds)) from None


def meet(here: RankInfo, seconds: float) -> distributed.Store:
    """The store at MASTER_ADDR:MASTER_PORT, which all ranks have reached."""
    store, _, _ = next(rendezvous("env://", here.rank, here.world, timeout=timedelta(seconds=seconds)))
    store.set_timeout(timedelta(seconds=seconds))
    # Of its own for each meeting: the store outlives a group, and in it the sockets that the next would connect to.
    return distributed.PrefixStore(f"mitrain/{next(_meetings)}", store)


def why_apart(message: str, here: RankInfo, seconds: float) -> str:
    meeting = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
    if "EADDRINUSE" in message or "in use" in message:
        return f"the port of {meeting} is in use: set MASTER_PORT to a free one, the same for all ranks"
    if "imed out" in message or "timeout" in message.lower():
        return (
            f"rank {here.rank} waited {seconds:g} s at {meeting} and not all {here.world} ranks came:"
            " start all of them, with the same MASTER_ADDR and MASTER_PORT"
        )
    reason = message.splitlines()[0][:200] if message else "no reason given"
    return f"rank {here.rank} of {here.world} cannot meet the others at {meeting} ({reason}): check both and the network"


def shorten_timeout() -> None:
    """From here a silent rank is given up after ``$MITRAIN_STEP_TIMEOUT`` seconds, ``$MITRAIN_TIMEOUT`` if that is less."""
    if world() > 1:
        seconds = min(timeout(), timeout("MITRAIN_STEP_TIMEOUT", STEP_S))
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def mark(step: int) -> None:
    """Tell the others that this rank has come to the collectives of ``step``: if one does not, they can name it."""
    if _store is not None:
        with suppress(RuntimeError):  # the collective itself says it better
            _store.set(f"at/{rank()}", f"{step} {socket.gethostname()}")


def absent(error: RuntimeError) -> str:
    """The ranks that have not come as far as this one, as "; rank 1 on node-2 had not come to step 7"; or "".

    The store lies in rank 0's process, which may be the one that has gone: after anything but a time-out only that asks.
    """
    if _store is None or (rank() and "imed out" not in str(error)):
        return ""
    try:
        here, told = rank(), [f"at/{r}" for r in range(world())]
        at = within(ALIKE_S, lambda: [_store.get(name).decode() if _store.check([name]) else "" for name in told])
    except (TimeoutError, RuntimeError):
        return ""
    steps = [int(text.partition(" ")[0] or 0) for text in at]
    behind = [f"rank {r} on {at[r].partition(' ')[2] or 'an unknown host'}" for r, s in enumerate(steps) if s < steps[here]]
    return f"; {', '.join(behind[:4])} had not come to step {steps[here]}" if behind else ""


def initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if initialized() else 0


def world() -> int:
    return distributed.get_world_size() if initialized() else 1


def is_main() -> bool:
    return rank() == 0


def say(text: str, **options: Any) -> None:
    """``print`` on rank 0 alone."""
    if is_main():
        print(text, **options)


def shard_of(count: int, here: RankInfo | None = None) -> slice:
    """This rank's part of ``count`` things in a row; the parts' sizes differ by one at most."""
    here = here or RankInfo(rank(), world())
    return slice(count * here.rank // here.world, count * (here.rank + 1) // here.world)


@contextmanager
def answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} lost the others ({reason(error)}{absent(error)}): look for the first message of another rank,"
            " then resume"
        ) from None


def reason(error: RuntimeError) -> str:
    """The first line of torch's message, without the place in the sources of gloo that it may begin with."""
    lines = re.sub(r"^\[\S*:\d+\]\s*", "", str(error)).splitlines()
    return lines[0][:120] if lines else "no reason given"


def sum_across(tensor: Tensor) -> Tensor:
    """``tensor`` summed over all ranks, in place; bit for bit the same on each."""
    if world() > 1:
        with answered():
            distributed.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    return bool(sum_across(torch.tensor(float(flag))) > 0)


def barrier() -> None:
    """Wait until every rank is here."""
    any_rank(False)


def lockstep(items: Sequence[T], spare: T | None = None) -> Iterator[tuple[T, bool]]:
    """This rank's ``items``, then repetitions (marked False) until the rank with the most is through.

    Every rank so does the same number of rounds, which it must where the weights lie on all of them. ``spare`` stands in
    on a rank that has no item to repeat.
    """
    rounds = max(gather(len(items)))
    for i in range(rounds):
        own = i < len(items)
        yield (items[i] if own else items[-1] if items else spare), own


def gather(value: T) -> list[T]:
    """Every rank's ``value``, in the order of ranks, on every rank; they may differ in size."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with answered():
        distributed.all_gather_object(values, value)
    return values


def first_not_none(value: T | None) -> T | None:
    """The ``value`` of the lowest rank that has one, on every rank."""
    if not any_rank(value is not None):
        return None
    return next(held for held in gather(value) if held is not None)


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` returns or raises on rank 0, on every rank; the others wait for it and do not call it.

    An error that has travelled is marked ``reported``: rank 0 reports it.
    """
    if world() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = make()
        except (UserError, OSError) as error:
            box[1] = error
    with answered():
        distributed.broadcast_object_list(box)
    if box[1] is not None:
        box[1].reported = not is_main()
        raise box[1]
    return box[0]


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` by those of rank 0."""
    for tensor in tensors if world() > 1 else ():
        with answered():
            distributed.broadcast(tensor, 0)
