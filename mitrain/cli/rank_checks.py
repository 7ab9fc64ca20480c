"""What only ranks together show: how fast they reach one another, and whether a step on all of them is the same step."""

import hashlib
import socket
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from mitrain.cli.checks import Check
from mitrain.core import dist
from mitrain.methods.mit.mit import MiTConfig, attach
from mitrain.training.engine import Group, LocalEngine

SIZE, TIMES = 4 << 20, 3  # float32 numbers of one all-reduce, and how many are timed
LEAST_MB_S = 50.0


def united(checks: Sequence[Check]) -> list[Check]:
    """Every rank's checks as one list: a fault of any rank is the check's, with the machines that have it."""
    host = socket.gethostname()
    of_ranks = dist.gather([(host, check) for check in checks])
    merged = []
    for same in zip(*of_ranks, strict=True):
        bad = {where: check for where, check in same if not check.ok}
        first = next(iter(bad.values()), same[0][1])
        detail = "; ".join(f"{where}: {check.detail}" for where, check in bad.items()) if bad else first.detail
        merged.append(Check(first.name, not bad, detail, first.fix))
    return merged


def bandwidth(least: float = LEAST_MB_S) -> Check:
    """MB/s of a rank in an all-reduce, 2 (n − 1) / n times the buffer's bytes on n ranks; the slowest rank's counts."""
    buffer = torch.ones(SIZE, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.sum_across(buffer)  # connects the ranks
    dist.barrier()
    start = time.perf_counter()
    for _ in range(TIMES):
        dist.sum_across(buffer)
    float(buffer[0])  # waits for a GPU
    seconds = max(dist.gather(time.perf_counter() - start)) / TIMES
    speed = 2 * (dist.world() - 1) / dist.world() * buffer.nbytes / seconds / 1e6
    detail = f"{speed:.0f} MB/s a rank in an all-reduce of {buffer.nbytes >> 20} MiB over {dist.world()} ranks"
    fix = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the fast interface; NCCL_DEBUG=INFO says what NCCL took"
    return Check("bandwidth", speed >= least, detail, fix * (speed < least))


def smoke_step() -> Check:
    """A step of MiT on a random model of two layers, another sample on each rank: all must hold the same weights then."""
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = LlamaModel(shape).requires_grad_(False)
    adapter = attach(model, MiTConfig(modalities={"image": 8}, layers=[1]))
    engine = LocalEngine([Group("adapter", dict(adapter.named_parameters()), 1e-2)], lambda step: 1.0)
    torch.manual_seed(1 + dist.rank())
    with adapter.bind({"image": torch.randn(1, 8)}):
        hidden = model(torch.randint(32, (1, 16))).last_hidden_state
    engine.backward(hidden.square().sum(), 1)
    result = engine.step()
    digests = dist.gather(digest(adapter))
    if not result.applied:
        return Check("step", False, f"the step was skipped: {result.reason}", "report this with the text above")
    odd = [rank for rank, found in enumerate(digests) if found != digests[0]]
    fix = "the ranks' versions, processors or GPUs differ: compare mitrain doctor on each machine"
    detail = f"ranks {odd} hold other weights than rank 0 after one step" if odd else f"loss {result.loss:.4f} on all ranks"
    return Check("step", not odd, detail, fix * bool(odd))


def digest(module: nn.Module) -> str:
    tensors: list[Tensor] = [p.detach().cpu().contiguous() for p in module.parameters()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
