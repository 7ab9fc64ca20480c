"""Inside a worker: one provider on one case, timed and weighed.

``forward`` runs with gradients on (what a training step pays), ``backward`` on graphs made beforehand, ``both`` one
after the other; gradients are returned, not added up. A timed sample lasts ``SAMPLE_MS`` at least: cheap calls are
repeated. One untimed call goes before it, because the other workers had the caches in between. No garbage collection.
"""

import contextlib
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile, record_function

from bench.cases import Case, make_inputs
from bench.providers import Provider

SAMPLE_MS = 5.0
MOST_CALLS, MOST_GRAPHS = 256, 16
MIDDLE = "bench: backward"


class Subject:
    """A provider bound to a case's inputs."""

    def __init__(self, provider: Provider, case: Case, device: str):
        inputs, self.upstream = make_inputs(case, device)
        self.inputs = {name: inputs[name] for name in provider.inputs}
        self.trained = [x for x in self.inputs.values() if x.requires_grad]
        self.run, self.cuda, self.modes = provider.run, device == "cuda", case.modes
        self.calls = {mode: self.calibrate(mode) for mode in case.modes}

    def forward(self) -> Tensor:
        return self.run(**self.inputs)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.trained, self.upstream)

    def calibrate(self, mode: str) -> int:
        """Calls per sample, from the best of three after a warm-up."""
        best = max(min(self.timed(mode, 1) for _ in range(3)), 1e-4)
        return min(math.ceil(SAMPLE_MS / best), MOST_GRAPHS if mode == "backward" else MOST_CALLS)

    def sample(self, mode: str) -> float:
        return self.timed(mode, self.calls[mode])

    def timed(self, mode: str, calls: int) -> float:
        """Milliseconds per call."""
        gc.collect()
        gc.disable()
        try:
            if mode == "backward":
                self.backward(self.forward())
                graphs = [self.forward() for _ in range(calls)]
                return self.clock(lambda: self.backward(graphs.pop()), calls)
            work = self.forward if mode == "forward" else lambda: self.backward(self.forward())
            work()
            return self.clock(work, calls)
        finally:
            gc.enable()

    def clock(self, work: Callable[[], Any], calls: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                work()
            return (time.perf_counter() - start) * 1e3 / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls

    def memory(self) -> dict[str, Any]:
        """Bytes saved for backward, and per mode the peak above what was there before."""
        peaks = (peaks_on_cuda if self.cuda else peaks_on_cpu)(self)
        return {"saved_bytes": self.saved_bytes(), "peak_bytes": {mode: peaks[mode] for mode in self.modes}}

    def saved_bytes(self) -> int:
        """What autograd holds between forward and backward, inputs included, each storage once.

        Counted: tensors saved through autograd, and those that an autograd.Function keeps as attributes of its ctx.
        """
        saved: list[Tensor] = []
        with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            output = self.forward()
        saved += [x for node in nodes(output.grad_fn) for x in tensors_in(getattr(node, "__dict__", {}))]
        return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in saved)}.values())


def nodes(root: Any) -> set[Any]:
    """Every node of the autograd graph above ``root``."""
    found, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return found


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for item in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(item)


def peaks_on_cuda(subject: Subject) -> dict[str, int]:
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = subject.forward()
    torch.cuda.synchronize()
    forward, middle = torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = subject.backward(output) if subject.trained else ()
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated()
    del kept
    return {"forward": forward, "backward": highest - middle, "both": max(forward, highest - start)}


def peaks_on_cpu(subject: Subject) -> dict[str, int]:
    """From the allocator's own events, so that an operator's inner buffers count too."""
    with quiet(), profile(profile_memory=True) as recorded:
        output = subject.forward()
        with record_function(MIDDLE):
            kept = subject.backward(output) if subject.trained else ()
    del kept
    events = list(recorded.kineto_results.events())
    middle = next(e.start_ns() for e in events if e.name() == MIDDLE)
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    before, after = ([n for t, n in changes if (t < middle) == early] for early in (True, False))
    forward, backward = (max(itertools.accumulate(part), default=0) for part in (before, after))
    return {"forward": forward, "backward": backward, "both": max(forward, sum(before) + backward)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The profiler's notices, written to the process's stderr by C++ code, go nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def rehearse() -> None:
    """Load what torch loads late, so that no case pays for it."""
    x = torch.ones(2, requires_grad=True)
    with quiet(), profile(profile_memory=True):
        torch.autograd.grad(x * x, x, torch.ones(2))
