"""What GPUs and links are said to do, by their makers' data sheets; of the CPU here, what it does now.

No GPU was used to check these numbers. Rates are dense (no sparsity), bandwidths of links are those of one direction.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mitrain.core import memory
from mitrain.core.errors import ConfigError
from mitrain.models.loading import DTYPES

GB = 10**9
PER_NODE = 8


@dataclass(frozen=True)
class Machine:
    """``memory`` in bytes; ``flops`` a second in 16 bits and in fp32; ``bandwidth``, of its memory, and ``link``, to its
    neighbours in the node, in bytes a second. ``reserve``: bytes of a GPU that are not for tensors."""

    name: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    link: float
    reserve: int


def gpu(name: str, gib: float, half: float, single: float, memory: float, link: float) -> Machine:
    """TFLOPS, and GB a second. Reserved: a CUDA context and libraries, and 4 % that an allocator cannot give."""
    size = int(gib * 2**30)
    rates = {"fp32": single * 1e12, "bf16": half * 1e12, "fp16": half * 1e12}
    return Machine(name, size, rates, memory * GB, link * GB, int(0.75 * 2**30 + 0.04 * size))


GPUS = {
    made.name: made
    for made in (
        gpu("a100-40g", 39.4, 312, 19.5, 1555, 300),
        gpu("a100-80g", 79.2, 312, 19.5, 2039, 300),
        gpu("h100-80g", 79.6, 989, 67, 3350, 450),
        gpu("h200-141g", 140, 989, 67, 4800, 450),
        gpu("b200-180g", 178, 2250, 75, 7700, 900),
        gpu("mi300x-192g", 191, 1307, 163, 5300, 448),
        gpu("l40s-48g", 44.9, 362, 91.6, 864, 32),
        gpu("l4-24g", 22.4, 121, 30.3, 300, 32),
        gpu("rtx4090-24g", 23.6, 165, 82.6, 1008, 32),
    )
}
NETWORKS = {"infiniband": 50 * GB, "ethernet": 12.5 * GB / PER_NODE}
"""Bytes a second of one rank between nodes: 400 Gb/s for each GPU, and 100 Gb/s for each node, which its GPUs share."""
NETWORK_TEXT = {"infiniband": "400 Gb/s for each rank", "ethernet": "100 Gb/s for each node, shared by its 8 ranks"}


def machine_of(name: str | None, memory_gb: float | None = None, per_node: int = 1) -> Machine:
    """The GPU ``name``; without one, the CPU here. ``memory_gb``: GiB of a rank, in place of the machine's own, which
    ``per_node`` ranks share where it is a CPU's."""
    if name not in (None, "cpu", *GPUS):
        raise ConfigError(f"--gpu {name} is not known: choose one of cpu, {', '.join(GPUS)}, and set --memory to change it")
    if memory_gb is not None and not 0 < memory_gb < 1e6:
        raise ConfigError(f"--memory {memory_gb} must be positive: give the GiB of a rank")
    found = cpu(per_node) if name in (None, "cpu") else GPUS[name]
    if memory_gb is None:
        return found
    return Machine(found.name, int(memory_gb * 2**30), found.flops, found.bandwidth, found.link, found.reserve)


def cpu(ranks: int) -> Machine:
    """This machine: what each of ``ranks`` may take of its memory, what products and copies do in a tenth of a second."""
    rates = {name: products(dtype) for name, dtype in DTYPES.items()}
    source = torch.zeros(1 << 23)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes * often(lambda: target.copy_(source))
    return Machine("cpu", memory.there() // max(1, ranks), rates, bandwidth, bandwidth / 4, 0)


def products(dtype: torch.dtype, side: int = 512) -> float:
    """FLOPs a second of matrix products."""
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 * often(lambda: left @ right)


def often(work: Callable[[], object], seconds: float = 0.1) -> float:
    """How often ``work`` runs in a second, at its fastest."""
    work()
    best, until = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < until:
        work()
        best = min(best, time.perf_counter() - start)
    return 1 / best


def resident() -> int:
    """Bytes of this process that lie in memory."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else 0
