"""What each kernel must move and compute, beside what an A100 and an H100 can: a model by arithmetic, no measurement.

Bytes are those of main memory when every tensor is read or written once: what a kernel reads again comes from the
caches. FLOPs of attention are those of its dots (2 per multiply-add, over visible pairs of query and key), for the
tensor cores; the element-wise work, O(T d), is left out. The kernels without a dot are held against the vector rate.

Symbols: B samples, H query heads, G key/value heads, T queries, S keys, d head width, M modalities, R tokens, F width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

HALF, SINGLE = 2, 4  # bytes of bf16 or fp16, and of fp32


@dataclass(frozen=True)
class Gpu:
    """``tensor``: dense bf16 FLOP/s with fp32 accumulation; ``vector``: fp32 FLOP/s; ``memory``: bytes/s."""

    name: str
    tensor: float
    vector: float
    memory: float


# Sources: NVIDIA's data sheets of the A100 80GB SXM4 and of the H100 SXM5, without sparsity.
GPUS = (Gpu("A100", 312e12, 19.5e12, 2.039e12), Gpu("H100", 989.4e12, 66.9e12, 3.35e12))


@dataclass(frozen=True)
class Shape:
    """Of causal attention; the T queries are the last of the S keys."""

    B: int
    H: int
    G: int
    T: int
    S: int
    d: int
    M: int = 1

    @property
    def pairs(self) -> int:
        """(query, key) pairs that a causal mask shows, of one head."""
        return self.T * self.S - self.T * (self.T - 1) // 2

    @property
    def queries(self) -> int:
        """Elements of a tensor with the shape of q."""
        return self.B * self.H * self.T * self.d

    @property
    def keys(self) -> int:
        """Elements of a tensor with the shape of k."""
        return self.B * self.G * self.S * self.d

    @property
    def rows(self) -> int:
        """One number per query and head."""
        return self.B * self.H * self.T

    @property
    def maps(self) -> int:
        """Elements of k_mul, v_mul or v_add."""
        return self.M * self.B * self.H * self.d


@dataclass(frozen=True)
class Cost:
    """Of one kernel launch; ``tensor``: its FLOPs are for the tensor cores."""

    bytes: int
    flops: int
    tensor: bool = True

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def limits(self, gpu: Gpu) -> tuple[float, float]:
        """(seconds for the bytes, seconds for the FLOPs), each at the GPU's full rate."""
        return self.bytes / gpu.memory, self.flops / (gpu.tensor if self.tensor else gpu.vector)


def dots(shape: Shape, count: int) -> int:
    """FLOPs of ``count`` dots over all visible pairs."""
    return 2 * count * shape.B * shape.H * shape.pairs * shape.d


def gate_cost(s: Shape) -> Cost:
    """One read of V; out come Σ V·v_add per modality, token and query head, and Σ ‖V‖² per token and kv head."""
    sums = s.M * s.B * s.H * s.S + s.B * s.G * s.S
    return Cost(HALF * (s.keys + s.maps) + SINGLE * sums, 2 * s.d * sums, tensor=False)


def forward_cost(s: Shape) -> Cost:
    """Reads q, k, v, three maps, a gate per modality and row; writes o and a log-sum-exp per row. 2 dots."""
    return Cost(HALF * (2 * s.queries + 2 * s.keys + 3 * s.maps) + SINGLE * (s.M + 1) * s.rows, dots(s, 2))


def dq_cost(s: Shape) -> Cost:
    """Reads q, k, v, dO, the plain output A, gates, log-sum-exp; writes dq, q', dA, rowsum(dA ⊙ A) and dgate. 3 dots."""
    return Cost(HALF * (6 * s.queries + 2 * s.keys + 6 * s.maps) + SINGLE * (2 * s.M + 2) * s.rows, dots(s, 3))


def dkdv_cost(s: Shape) -> Cost:
    """Reads q', k, v, dA, log-sum-exp and rowsum(dA ⊙ A); writes dk, dv. 4 dots."""
    return Cost(HALF * (2 * s.queries + 4 * s.keys) + SINGLE * 2 * s.rows, dots(s, 4))


def swiglu_forward_cost(samples: int, tokens: int, width: int) -> Cost:
    """Reads gate, up and f, writes the output. 5 FLOPs per element: exp, +, ÷ and two products."""
    elements = samples * tokens * width
    return Cost(3 * HALF * elements + SINGLE * samples * width, 5 * elements, tensor=False)


def swiglu_backward_cost(samples: int, tokens: int, width: int) -> Cost:
    """Reads dO, gate, up and f, writes dgate, dup and df. 15 FLOPs per element: σ again, two slopes and the sum."""
    elements = samples * tokens * width
    return Cost(5 * HALF * elements + 2 * SINGLE * samples * width, 15 * elements, tensor=False)


TRAINING = tuple(Shape(B=4, H=32, G=8, T=length, S=length, d=128) for length in (512, 2048, 8192))
DECODING = tuple(replace(shape, T=1) for shape in TRAINING)
FEED_FORWARD = 14336  # the width F that goes with H = 32 and d = 128 in Llama 3 8B


def costs() -> list[tuple[str, str, Cost]]:
    """(kernel, shape, cost) of everything that the table shows."""
    found = []
    for s in TRAINING:
        kernels = {"gate": gate_cost, "forward": forward_cost, "dq": dq_cost, "dkdv": dkdv_cost}
        text = f"B{s.B} H{s.H} G{s.G} T{s.T} d{s.d}"
        found += [(f"infused_attention_{name}", text, cost(s)) for name, cost in kernels.items()]
    for s in DECODING:
        found.append(("infused_attention_decode", f"B{s.B} H{s.H} G{s.G} T1 S{s.S} d{s.d}", forward_cost(s)))
    for s in TRAINING:
        text = f"B{s.B} T{s.T} F{FEED_FORWARD}"
        found.append(("infused_swiglu_forward", text, swiglu_forward_cost(s.B, s.T, FEED_FORWARD)))
        found.append(("infused_swiglu_backward", text, swiglu_backward_cost(s.B, s.T, FEED_FORWARD)))
    return found


def rows() -> list[dict[str, Any]]:
    """One row per kernel and shape, with the time at each GPU's roofline in microseconds and what sets it."""
    found = []
    for kernel, shape, cost in costs():
        row = {"kernel": kernel, "shape": shape, "bytes": cost.bytes, "flops": cost.flops}
        row["flops_per_byte"] = round(cost.intensity, 2)
        for gpu in GPUS:
            memory, compute = cost.limits(gpu)
            row[f"{gpu.name}_bound"] = "memory" if memory >= compute else "compute"
            row[f"{gpu.name}_us"] = round(max(memory, compute) * 1e6, 2)
        found.append(row)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = {"bytes": "MB", "flops": "GFLOP", "flops_per_byte": "FLOP/B"}
    scale = {"bytes": 1e-6, "flops": 1e-9}
    cells = [[names.get(name, name) for name in rows[0]]]
    cells += [[f"{x * scale[name]:.1f}" if name in scale else str(x) for name, x in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head = [
        f"{gpu.name}: {gpu.tensor / 1e12:g} TFLOP/s bf16 dense (attention), {gpu.vector / 1e12:g} TFLOP/s fp32 (gate, "
        f"SwiGLU), {gpu.memory / 1e12:g} TB/s; compute is the bound above {gpu.tensor / gpu.memory:.0f} bf16 FLOP/B"
        for gpu in GPUS
    ]
    model = "A model, not measured on a GPU: every tensor moves once, attention is causal, bf16, M = 1."
    return "\n".join([model, *head, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)])
