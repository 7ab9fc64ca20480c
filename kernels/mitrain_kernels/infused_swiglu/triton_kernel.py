"""Infused SwiGLU as one Triton kernel forward and one backward; df is summed in a fixed order, without atomics.

A program takes COLUMNS of the width and one share of one sample's tokens, ROWS at a time: f is read once per program,
and its share of df stays in registers until the end. Loads and stores are all that costs: 6 bytes per element forward
and 10 backward in bfloat16.

Not run on a GPU yet: interpreted on the CPU, compiled and audited for the targets below. SiLU uses the GPU's fast e^x,
so that at f = 1 a result may be an ulp beside the frozen activation, which the backend 'torch' meets exactly.

Shapes: R tokens in all, S samples (packed, or padded with R = S · tokens), F width.
"""

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """rows × columns elements at a time, ``steps`` times per program for samples of average length."""

    rows: int
    columns: int
    steps: int
    warps: int


# (forward, backward); 16 elements of each tensor per thread forward, 8 backward, where they are held in float32.
TILES: dict[str, tuple[Tile, Tile]] = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), (Tile(4, 512, 4, 4), Tile(4, 256, 16, 4))),
    "interpreter": (Tile(4, 32, 2, 1), Tile(4, 32, 2, 1)),
}
UNEVEN = 4
"""Packed samples differ in length: so many times the average are spread over programs before one has to loop longer."""


@triton.jit
def tokens_of(BOUNDS, sample, tokens):
    """First token of a sample and how many it has; BOUNDS None: ``tokens`` each."""
    if BOUNDS is None:
        first = sample.to(tl.int64) * tokens
        length = tokens
    else:
        first = tl.load(BOUNDS + sample).to(tl.int64)
        length = tl.load(BOUNDS + sample + 1) - tl.load(BOUNDS + sample)
    return first, length


@triton.jit(do_not_specialize=["tokens", "splits"])
def forward_kernel(
    GATE, UP, FACTOR, OUT, BOUNDS, tokens, splits, width, gate_stride, up_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = SiLU(gate) · up · f, rounded to out's type after each step."""
    blocks = tl.cdiv(width, COLUMNS)
    sample = tl.program_id(0) // blocks // splits
    share = tl.program_id(0) // blocks % splits
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    inside = columns < width
    first, length = tokens_of(BOUNDS, sample, tokens)
    f = tl.load(FACTOR + sample.to(tl.int64) * width + columns, mask=inside, other=0.0).to(tl.float32)
    for start in range(share * ROWS, length, splits * ROWS):
        mask = (start + rows < length)[:, None] & inside[None, :]
        gates = GATE + (first + start) * gate_stride + (rows[:, None] * gate_stride + columns[None, :])
        ups = UP + (first + start) * up_stride + (rows[:, None] * up_stride + columns[None, :])
        outs = OUT + (first + start) * width + (rows[:, None] * width + columns[None, :])
        x = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(ups, mask=mask, other=0.0).to(tl.float32)
        silu = tl.div_rn(x, 1.0 + tl.exp(-x)).to(OUT.dtype.element_ty).to(tl.float32)
        hidden = (silu * u).to(OUT.dtype.element_ty).to(tl.float32)
        tl.store(outs, (hidden * f[None, :]).to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "splits", "samples"])
def backward_kernel(
    GRAD, GATE, UP, FACTOR, DGATE, DUP, PARTS, BOUNDS,
    tokens, splits, samples, width, grad_stride, gate_stride, up_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgate = g f u SiLU'(x), dup = g f SiLU(x), parts (splits, S, F) = Σ_share g u SiLU(x); None is not computed.

    where: g the upstream gradient, x gate, u up, SiLU'(x) = σ(x) (1 + x (1 - σ(x))).
    """
    blocks = tl.cdiv(width, COLUMNS)
    sample = tl.program_id(0) // blocks // splits
    share = tl.program_id(0) // blocks % splits
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    inside = columns < width
    first, length = tokens_of(BOUNDS, sample, tokens)
    f = tl.load(FACTOR + sample.to(tl.int64) * width + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(share * ROWS, length, splits * ROWS):
        mask = (start + rows < length)[:, None] & inside[None, :]
        grads = GRAD + (first + start) * grad_stride + (rows[:, None] * grad_stride + columns[None, :])
        gates = GATE + (first + start) * gate_stride + (rows[:, None] * gate_stride + columns[None, :])
        g = tl.load(grads, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-x))
        tile = rows[:, None] * width + columns[None, :]
        if DUP is not None:
            dup = (g * f[None, :] * (x * sigma)).to(DUP.dtype.element_ty)
            tl.store(DUP + (first + start) * width + tile, dup, mask=mask)
        if DGATE is not None or PARTS is not None:
            ups = UP + (first + start) * up_stride + (rows[:, None] * up_stride + columns[None, :])
            both = g * tl.load(ups, mask=mask, other=0.0).to(tl.float32)
            if DGATE is not None:
                slope = sigma * (1.0 + x * (1.0 - sigma))
                dgate = (both * f[None, :] * slope).to(DGATE.dtype.element_ty)
                tl.store(DGATE + (first + start) * width + tile, dgate, mask=mask)
            total += both * (x * sigma)
    if PARTS is not None:
        part = (share * samples + sample).to(tl.int64) * width
        tl.store(PARTS + part + columns, tl.sum(total, axis=0), mask=inside)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def check(gate: Tensor) -> None:
    """ValueError where the kernels cannot serve ``gate``."""
    if gate.dtype == torch.float64:
        raise ValueError("backend 'triton' does not compute in float64: use backend='torch'")
    if gate.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"backend 'triton' needs a GPU, but tensors are on {gate.device}: use backend='torch'")


def tiles(device: torch.device) -> tuple[Tile, Tile]:
    """The entry of ``TILES`` for a device: a GPU newer or smaller than those listed takes that of the nearest."""
    if INTERPRETED:
        return TILES["interpreter"]
    if torch.version.hip:
        return TILES["gfx942"]
    major, _ = torch.cuda.get_device_capability(device)
    return TILES["sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"]


def token_rows(x: Tensor) -> Tensor:
    """(..., F) as (R, F) with adjacent columns: a view wherever one is possible."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def shares(gate: Tensor, samples: int, packed: bool, tile: Tile) -> int:
    """Over how many programs one sample's tokens are spread, known without reading the lengths from the GPU."""
    tokens = gate.shape[0] if packed else gate.shape[1]
    step = tile.rows * tile.steps
    if packed:
        tokens = min(tokens, UNEVEN * step * triton.cdiv(triton.cdiv(tokens, samples), step))
    return max(1, triton.cdiv(tokens, step))


def on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def forward(gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The output, in gate's type; arguments as in the reference."""
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if output.numel() == 0:
        return output
    (samples, width), (tile, _) = f.shape, tiles(gate.device)
    splits = shares(gate, samples, cu_seqlens is not None, tile)
    x, u = token_rows(gate), token_rows(up)
    with on(gate.device):
        forward_kernel[(samples * splits * triton.cdiv(width, tile.columns),)](
            x, u, f.contiguous(), output, cu_seqlens, gate.shape[-2], splits, width, x.stride(0), u.stride(0),
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return output


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and f; an empty tensor stands for one that is not needed."""
    dgate, dup = (torch.empty(gate.shape if n else 0, dtype=gate.dtype, device=gate.device) for n in needs[:2])
    (samples, width), (_, tile) = f.shape, tiles(gate.device)
    if f.numel() == 0 or not any(needs):
        return dgate, dup, torch.zeros(f.shape if needs[2] else 0, dtype=f.dtype, device=f.device)
    splits = shares(gate, samples, cu_seqlens is not None, tile)
    parts = torch.empty((splits, *f.shape) if needs[2] else 0, dtype=torch.float32, device=f.device)
    g, x, u = token_rows(grad), token_rows(gate), token_rows(up)
    written = (result if needed else None for result, needed in zip((dgate, dup, parts), needs, strict=True))
    with on(gate.device):
        backward_kernel[(samples * splits * triton.cdiv(width, tile.columns),)](
            g, x, u, f.contiguous(), *written, cu_seqlens,
            gate.shape[-2], splits, samples, width, g.stride(0), x.stride(0), u.stride(0),
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dgate, dup, (parts.sum(0) if needs[2] else parts).to(f.dtype)
