"""Two low-bit formats of a frozen matrix, as arithmetic on tensors.

int8: q = round(w / s) with one step s = max|row| / 127 per row, so the error is at most s / 2.
nf4:  every 64 weights in a row-major walk share a = max|w|; each is the nearest of 16 codes times a (QLoRA, Dettmers
      et al. 2023, https://arxiv.org/abs/2305.14314, appendix E). Two codes a byte, the first in the high half.

Both are always made here, never by another library, so that a payload does not depend on what is installed: caches are
addressed by it. Shapes: (out, in) matrices, n = out · in weights.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mitrain.core.errors import ModelError

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64
TINY = torch.finfo(torch.float32).tiny
PIECE = 2**20
"""Weights that are held in full precision at a time."""


def bytes_in(matrices: Iterable[Tensor], precision: str) -> int:
    """Bytes of ``matrices`` in int8, with an fp32 step a row, or in nf4, with one a block."""
    if precision == "int8":
        return sum(m.numel() + 4 * len(m) for m in matrices)
    return sum(-(-m.numel() // 2) + 4 * -(-m.numel() // NF4_BLOCK) for m in matrices)


def piece_rows(columns: int, block: int = 1, piece: int | None = None) -> int:
    """Rows of a matrix with ``columns`` columns in a piece of about ``piece`` weights that ends where a block does."""
    step = math.lcm(columns, block) // columns
    return max(1, (piece or PIECE) // columns // step) * step


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) floats → int8 (out, in) and steps fp32 (out,)."""
    payload = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    rows = piece_rows(weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].float()
        scale[start : start + rows] = (part.abs().amax(1) / 127).clamp_min(TINY)
        payload[start : start + rows] = (part / scale[start : start + rows, None]).round_()
    return payload, scale


def quantise_blocks(weight: Tensor, block: int = NF4_BLOCK) -> tuple[Tensor, Tensor]:
    """n floats of any shape → packed uint8 (⌈n/2⌉,) and absmax fp32 (⌈n/block⌉,)."""
    flat = weight.reshape(-1)
    piece = math.lcm(2, block) * max(1, PIECE // math.lcm(2, block))
    done = [quantise_piece(flat[start : start + piece], block) for start in range(0, len(flat), piece)]
    return torch.cat([part for part, _ in done]), torch.cat([part for _, part in done])


def quantise_piece(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    padded = torch.nn.functional.pad(flat.float(), (0, -len(flat) % math.lcm(2, block)))
    absmax = padded.view(-1, block).abs().amax(1)
    scaled = padded.view(-1, block) * (1 / absmax.clamp_min(1e-38))[:, None]
    table = torch.tensor(NF4, device=flat.device)
    codes = torch.bucketize(scaled.view(-1), (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    packed = codes[::2] << 4 | codes[1::2]
    return packed[: -(-len(flat) // 2)].clone(), absmax[: -(-len(flat) // block)].clone()


def dequantise_blocks(packed: Tensor, absmax: Tensor, block: int, count: int, dtype: torch.dtype) -> Tensor:
    """The first ``count`` weights of whole blocks, (count,) in ``dtype``; each is rounded once, from fp32.

    A byte looks up its pair of codes.
    """
    table = torch.tensor(NF4, dtype=torch.promote_types(dtype, torch.float32), device=packed.device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
    values = torch.nn.functional.embedding(packed.int(), pairs).view(-1)
    whole = count // block * block
    values[:whole].view(-1, block).mul_(absmax[: whole // block, None])
    values[whole:].mul_(absmax[-1])
    return values[:count].to(dtype)


def check_finite(steps: Tensor) -> None:
    """Refuse the steps of a matrix with weights that are not finite."""
    if not bool(steps.isfinite().all()):
        raise ModelError("a matrix to be quantised has weights that are not finite: its checkpoint is damaged")
