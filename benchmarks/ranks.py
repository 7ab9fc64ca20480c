"""Work in processes of its own: fresh ones, a thread each, ended together.

They are forks of a server that has imported the work's module and done nothing else: importing would take longer than
the steps. The server starts with the environment that a rank needs and is never a rank itself.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mitrain.core import provenance
from mitrain.core.errors import ConfigError, MissingExtraError, UserError

Work = Callable[..., None]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
    # What mitrain's command line tells glibc and torch: page faults on fresh blocks would be most of the time.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


def found(work: Work, arguments: tuple[Any, ...], ranks: int, limit_s: float) -> Any:
    """What ``work(*arguments, path)`` writes to its path as JSON on one of ``ranks``; UserError says why there is nothing:
    the first failing rank's last line, or that time ran out."""
    with tempfile.TemporaryDirectory(prefix="mitrain-bench-") as scratch:
        out = Path(scratch) / "found.json"
        reason = run(work, (*arguments, out), ranks, Path(scratch), limit_s)
        if reason:
            raise UserError(reason)
        return json.loads(out.read_text(encoding="utf-8"))


def machine() -> str:
    """The machine, and what the ranks talk through."""
    return f"{provenance.machine()}, gloo, a thread per rank"


def need_deepspeed(name: str) -> None:
    """One line before anything is measured, in place of one from each rank."""
    from mitrain.training.engine.zero import deepspeed

    try:
        deepspeed()
    except ConfigError:
        raise MissingExtraError(
            f"mitrain bench {name} measures DeepSpeed's ZeRO, and deepspeed is not installed:"
            " install it with pip install 'mitrain[deepspeed]'"
        ) from None


def run(work: Work, arguments: tuple[Any, ...], ranks: int, scratch: Path, limit_s: float) -> str | None:
    """Run the ranks to their ends; None, or why one failed. None is left behind."""
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    says, processes = [scratch / f"{rank}.err" for rank in range(ranks)], []
    with clean_environment():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.__module__])
        try:
            for rank, said in enumerate(says):
                place = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
                processes.append(context.Process(target=be_rank, args=(place, said, work, arguments)))
                processes[-1].start()
            failed = wait(processes, time.monotonic() + limit_s)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
    if failed is None:
        return None
    return f"no result after {limit_s:g} s" if failed < 0 else last_line(says[failed], processes[failed].exitcode)


def be_rank(place: dict[str, str], said: Path, work: Work, arguments: tuple[Any, ...]) -> None:
    """One rank's whole life; what it says goes to a file."""
    os.environ.update(place)
    file = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
    for number in (1, 2):
        os.dup2(file, number)
    code = 0
    try:
        work(*arguments)
    except UserError as error:
        os.write(2, f"{error}\n".encode())
        code = error.exit_code
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        code = 1
    if code:
        os._exit(code)  # a rank whose partner has failed would wait for it on its way out


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Inside, our environment has what a rank needs and no launcher's place: the server takes it over."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    for name in LAUNCHED:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def wait(processes: list[Any], until: float) -> int | None:
    """None once all have ended well, else the first that did not; -1 when time runs out."""
    while time.monotonic() < until:
        codes = [process.exitcode for process in processes]
        bad = [rank for rank, code in enumerate(codes) if code]
        if bad:
            return bad[0]
        if all(code == 0 for code in codes):
            return None
        multiprocessing.connection.wait([p.sentinel for p, code in zip(processes, codes, strict=True) if code is None], 1.0)
    return -1


def last_line(path: Path, code: int | None) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else f"ended with {code} and no message")[:300]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
