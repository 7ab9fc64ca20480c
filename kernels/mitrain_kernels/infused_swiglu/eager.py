"""Infused SwiGLU in few passes of plain torch, forward and backward: no intermediate outlives a block of tokens.

Blocks are small enough to stay in a CPU's cache; in low precision only a block is widened at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

aten = torch.ops.aten
CPU_BLOCK = 1 << 18
"""Elements per block on a CPU: what was fastest of 2¹⁴ to 2¹⁸ on one core, and far below a whole activation."""

Place = tuple[slice, slice] | slice


def blocks(gate: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[Place, slice | int]]:
    """Where the tokens of each block lie in gate (B, T, F) or (R, F), and their row, or rows, of f."""
    tokens = max(1, (CPU_BLOCK if gate.device.type == "cpu" else gate.numel()) // max(1, gate.shape[-1]))
    if cu_seqlens is None:
        batch, length = gate.shape[:2]
        rows = max(1, tokens // max(1, length))
        for row in range(0, batch, rows):
            for start in range(0, length, tokens):
                yield (slice(row, row + rows), slice(start, start + tokens)), slice(row, row + rows)
        return
    bounds = cu_seqlens.tolist()
    for sample, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for start in range(first, end, tokens):
            yield slice(start, min(start + tokens, end)), sample


def forward(gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The output, in gate's type; arguments as in the reference."""
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    f = f.to(torch.promote_types(gate.dtype, torch.float32))
    for where, whose in blocks(gate, cu_seqlens):
        block = aten.silu.out(gate[where], out=output[where])
        block.mul_(up[where]).mul_(f[whose].unsqueeze(-2))
    return output


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of gate, up and f; an empty tensor stands for one that is not needed.

    dgate = grad ⊙ f ⊙ up ⊙ SiLU'(gate)     SiLU'(x) = σ(x) (1 + x (1 - σ(x)))
    dup   = grad ⊙ f ⊙ SiLU(gate)
    df    = Σ_tokens grad ⊙ up ⊙ SiLU(gate)
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    dgate, dup = (torch.empty(gate.shape if n else 0, dtype=gate.dtype, device=gate.device) for n in needs[:2])
    df = torch.zeros(f.shape if needs[2] else 0, dtype=wide, device=f.device)
    factors = f.to(wide)
    for where, whose in blocks(gate, cu_seqlens):
        x, u, upstream = (tensor[where].to(wide) for tensor in (gate, up, grad))
        factor = factors[whose].unsqueeze(-2)
        both = upstream * u if needs[0] or needs[2] else None
        if needs[0]:
            slope = aten.silu_backward(both, x)
            torch.mul(slope, factor, out=dgate[where])
        if needs[1] or needs[2]:
            silu = aten.silu(x)
        if needs[2]:
            df[whose] += both.mul_(silu).sum(-2)
        if needs[1]:
            torch.mul(silu.mul_(upstream), factor, out=dup[where])
    return dgate, dup, df.to(f.dtype)
