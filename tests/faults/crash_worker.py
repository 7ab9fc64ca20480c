"""A process that saves checkpoints in forked children, for tests that kill them (torch is imported once).

One command per line on standard input, ``loop RUN_DIR`` or ``once RUN_DIR N``; the child's pid, every step it has
saved and its exit status come back on standard output. A child resumes from the newest checkpoint, checks that its
content is what that step wrote, and saves the following steps; under ``once`` it saves one step and kills itself
right before the N-th file operation inside of ``save`` (Python's audit events tell it; 0 for never).
"""

import os
import signal
import sys
from pathlib import Path

import torch

from mitrain import checkpoint

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "fcntl.flock"}


def content(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "adapter": {"weight": torch.randn(128, 128, generator=generator)},
        "optimizer": {"exp_avg.weight": torch.randn(128, 128, generator=generator)},
    }


def check(path: Path) -> int:
    """The step of the checkpoint at ``path``, whose tensors and state must be exactly what was saved."""
    loaded = checkpoint.load(path)
    for group, tensors in content(loaded.step).items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded.tensors[group][name], tensor), f"{group}.{name} of step {loaded.step}"
    assert loaded.state == {"cursor": loaded.step}
    return loaded.step


def save_next(run_dir: Path, operation: int = 0) -> int:
    """Save the step after the newest one; die before that file operation of the save, counted from 1."""
    newest = checkpoint.latest(run_dir)
    step = 1 + (check(newest) if newest else 0)
    if operation:
        kill_before(operation)
    checkpoint.save(run_dir, step, content(step), {"cursor": step}, keep=2, best=step % 5 == 0)
    return step


def kill_before(operation: int) -> None:
    seen = 0

    def hook(event: str, _args: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS:
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        command, run_dir, *operation = line.split()
        pid = os.fork()
        if pid == 0:
            say(f"done {save_next(Path(run_dir), *map(int, operation))}")
            while command == "loop":
                say(f"done {save_next(Path(run_dir))}")
            os._exit(0)
        say(f"pid {pid}")
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


if __name__ == "__main__":
    main()
