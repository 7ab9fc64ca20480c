"""A process that writes in forked children, for tests that kill them (torch is imported once).

One command per line on standard input: ``WHAT FOLDER [N]``; the child's pid, every step it has saved (``done``) and its
exit status (``ended``) come back on standard output. WHAT is

    loop      save checkpoints until killed; a child resumes from the newest and checks what it holds
    save      save one more checkpoint
    train     train to `LAST_STEP` with a checkpoint at every step, from the newest one
    trainer   the same with `mitrain.training.trainer.Trainer`, in the run folder of a configuration
    export    publish an adapter in FOLDER

and N says when the child kills itself: right before the N-th file operation of the save that `Killer` watches, or, if
negative, in the middle of the write that makes a file longer than -N bytes (the kernel does it).
"""

import importlib
import io
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig

from mitrain.core import parsing, safe_io
from mitrain.methods import export_format
from mitrain.methods.mit.mit import MiTConfig
from mitrain.training import checkpoint

LAST_STEP = 3
WATCHED = 2  # the save that is disturbed: the second, which also rotates the first away
FILE_MODULES = {"posix", "_io"}
LOOKS = {
    *("fspath", "stat", "lstat", "fstat", "scandir", "listdir", "getpid", "getuid", "fileno", "isatty", "seekable"),
    *("read", "readinto", "readall", "tell", "seek", "text_encoding", "readable", "writable", "__enter__", "is_dir"),
}
"""What changes nothing on the disk; a kill before it leaves what a kill before the next operation leaves.

The same holds of whatever the `READERS` do, which only read.
"""
READERS = (parsing.__file__, safe_io.__file__)


class Killer:
    """Counts the calls from Python into the modules of files, whatever they are called; nothing is listed by hand.

    Opening, every write to an open file, closing (which is when the kernel gets what was buffered), fsync, chmod, rename,
    unlink and rmdir are such calls. Names seen are kept in ``names``.
    """

    def __init__(self, at: int):
        self.at, self.seen, self.names = at, 0, set()

    def __enter__(self) -> "Killer":
        if self.at < 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (-self.at, resource.RLIM_INFINITY))
        sys.setprofile(self.watch)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def watch(self, frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or function.__name__ in LOOKS or frame.f_code.co_filename in READERS:
            return
        owner = getattr(function, "__self__", None)
        module = getattr(function, "__module__", None) or type(owner).__module__
        if module in FILE_MODULES and not isinstance(owner, io.BytesIO | io.StringIO):
            self.names.add(function.__name__)
            self.seen += 1
            if self.seen == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


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


def save(folder: Path, at: int) -> int:
    """Save the step after the newest one."""
    newest = checkpoint.latest(folder)
    step = 1 + (check(newest) if newest else 0)
    with Killer(at) as killer:
        checkpoint.save(folder, step, content(step), {"cursor": step}, keep=2, best=step % 5 == 0)
    if not at:
        say(f"names {','.join(sorted(killer.names))}")
    return step


def loop(folder: Path, _at: int) -> int:
    while True:
        say(f"done {save(folder, 0)}")


def watched(at: int) -> Callable[..., Path]:
    """`checkpoint.save`, whose call of the step `WATCHED` is disturbed."""
    real = checkpoint.save

    def disturbed(run_dir: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step != WATCHED or not at:
            return real(run_dir, step, *args, **kwargs)
        with Killer(at):
            return real(run_dir, step, *args, **kwargs)

    return disturbed


def train(folder: Path, at: int) -> int:
    """A net with dropout on data from all three random generators; every step's loss is in the checkpoint's state."""
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses, newest, keep = [], checkpoint.latest(folder), watched(at)
    if newest:
        saved = checkpoint.load(newest)
        checkpoint.restore(net, saved.tensors["adapter"], "adapter")
        checkpoint.resume_rng(saved.state["rng"], 0, saved.step)
        losses = saved.state["losses"]
    while len(losses) < LAST_STEP:
        count = random.randint(2, 6)
        x = torch.from_numpy(np.random.randn(count, 4)).float() + torch.randn(count, 4)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        state = {"losses": losses, "rng": checkpoint.rng_of_ranks()}
        keep(folder, len(losses), {"adapter": checkpoint.only_trainable(net)}, state, keep=1)
    return len(losses)


def trainer(folder: Path, at: int) -> int:
    from mitrain.training import runs
    from mitrain.training.trainer import Trainer

    checkpoint.save = watched(at)
    return Trainer(runs.read_config(folder), folder, quiet=True).fit().step


def export(folder: Path, at: int) -> int:
    """Publish the step's content in the new folder ``FOLDER/adapter``."""
    base = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=20)
    counts = export_format.Parameters(trainable=1, frozen=2)
    fields = export_format.method_fields("mit", MiTConfig(modalities={"image": 4}), base, "base", counts)
    with Killer(at):
        tensors = {"adapter": content(1)["adapter"]}
        export_format.publish(folder / "adapter", fields, tensors, export_format.model_card, {})
    return 1


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        what, folder, at = line.split()
        if what == "trainer":
            importlib.import_module("mitrain.training.trainer")  # once, not in every child
        pid = os.fork()
        if pid == 0:
            commands = {"loop": loop, "save": save, "train": train, "trainer": trainer, "export": export}
            say(f"done {commands[what](Path(folder), int(at))}")
            os._exit(0)
        say(f"pid {pid}")
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


if __name__ == "__main__":
    main()
