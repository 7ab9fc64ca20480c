"""``infused_swiglu``: one operator of torch for all backends, with its own backward pass; here also its definition and
the backend 'torch'.

Every form is tested against the definition, output and gradients.

Shapes: B samples, T tokens, F feed-forward width; packed: R tokens of S samples one after another.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "reference", "torch", "triton")
Gradients = tuple[Tensor | None, ...]
logger = logging.getLogger(__name__)
TRITON = importlib.util.find_spec("triton") is not None
"""Whether it is installed; it is imported at the first launch."""


def infused_swiglu_reference(gate: Tensor, up: Tensor, f: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    r"""H' = SiLU(gate) ⊙ up ⊙ f[sample], in the shape and type of ``gate``.

    where:
        gate = x W_gate and up = x W_up, (B, T, F) of one type; f (B, F), affine in the modality's feature.
        cu_seqlens (S + 1,) int32: tokens cu_seqlens[s] to cu_seqlens[s + 1] are sample s; then gate and up (R, F),
            f (S, F). A sample may have no token.

    Every product is taken in float32 or wider. SiLU(gate) and SiLU(gate) ⊙ up are rounded to gate's type, as in a
    frozen model of that type: f = 1 gives the frozen activation to the last bit.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    hidden = F.silu(gate) * up
    factors = f[:, None] if cu_seqlens is None else f.repeat_interleave(cu_seqlens.diff(), dim=0)
    return (hidden.to(wide) * factors.to(wide)).to(gate.dtype)


def infused_swiglu(
    gate: Tensor, up: Tensor, f: Tensor, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """SiLU(gate) ⊙ up ⊙ f[sample]; forward and backward read each tensor once and keep nothing but the inputs.

    where:
        gate and up (B, T, F) of one type, f (B, F); the output has gate's shape and type.
        cu_seqlens (S + 1,) int32 bounds S packed samples: gate and up (R, F), f (S, F). Its values rise from 0 to R
            (unchecked on a GPU, which would have to wait for them).
        backend: 'reference' the definition, 'torch' few passes of plain torch, 'triton' one kernel each way,
            'auto' triton on a GPU, else torch.

    The full definition is at ``infused_swiglu_reference``. Raises ValueError for what does not fit.
    """
    check(gate, up, f, cu_seqlens, backend)
    if backend == "reference":
        check_bounds(gate, cu_seqlens)
        return infused_swiglu_reference(gate, up, f, cu_seqlens=cu_seqlens)
    if torch.compiler.is_compiling():
        return torch.ops.mitrain_kernels.infused_swiglu.default(gate, up, f, cu_seqlens, backend)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad or f.requires_grad):
        return Recorded.apply(gate, up, f, cu_seqlens, backend)
    return compute(gate, up, f, cu_seqlens, backend)


def check(gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    if backend == "triton" and not TRITON:
        raise ValueError("backend 'triton' needs triton, which is not installed: use backend='torch'")
    if not gate.is_floating_point() or up.dtype != gate.dtype or not f.is_floating_point():
        raise ValueError(
            f"gate and up must be of one floating-point type and f of any, not {gate.dtype}, {up.dtype} and {f.dtype}"
        )
    if up.device != gate.device or f.device != gate.device:
        raise ValueError(f"gate, up and f must be on one device, not {gate.device}, {up.device} and {f.device}")
    layout, dims = ("(B, T, F)", 3) if cu_seqlens is None else ("(R, F) with cu_seqlens", 2)
    if gate.ndim != dims or up.shape != gate.shape:
        raise ValueError(f"gate and up must both be {layout}, not {tuple(gate.shape)} and {tuple(up.shape)}")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2):
        raise ValueError(f"cu_seqlens must be (S + 1,) int32, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    samples = len(gate) if cu_seqlens is None else len(cu_seqlens) - 1
    if f.ndim != 2 or f.shape[0] != samples or f.shape[1] != gate.shape[-1]:
        raise ValueError(f"f must be one row per sample, {(samples, gate.shape[-1])}, not {tuple(f.shape)}")


def check_bounds(gate: Tensor, cu_seqlens: Tensor | None) -> None:
    """On a CPU the values of cu_seqlens cost nothing to read."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != len(gate) or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {len(gate)}: {bounds}")


@cache
def automatic(device: str, wide: bool) -> str:
    """The backend that 'auto' stands for, for tensors on ``device``, ``wide`` in float64; its reason is logged once."""
    if device != "cuda":
        choice, reason = "torch", f"tensors are on {device}"
    elif wide:
        choice, reason = "torch", "float64, which the kernel does not compute in"
    elif not TRITON:
        choice, reason = "torch", "triton is not installed"
    else:
        choice, reason = "triton", "tensors are on a GPU"
    logger.info("infused_swiglu runs on the backend %r: %s", choice, reason)
    return choice


def implementation(gate: Tensor, backend: str) -> tuple[Callable[..., Tensor], Callable[..., Gradients]]:
    """The functions forward and backward that serve ``gate``."""
    if backend == "auto":
        backend = automatic(gate.device.type, gate.dtype == torch.float64)
    if backend == "torch":
        return eager_forward, eager_backward
    from mitrain_kernels.infused_swiglu import triton_kernel

    triton_kernel.check(gate)
    return triton_kernel.forward, triton_kernel.backward


# The backend 'torch': few passes forward and backward, and no intermediate outlives a block of tokens, small enough to stay
# in a CPU's cache; in low precision only a block is widened at a time.

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


def eager_forward(gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The output, in gate's type; arguments as in the reference."""
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    f = f.to(torch.promote_types(gate.dtype, torch.float32))
    for where, whose in blocks(gate, cu_seqlens):
        block = aten.silu.out(gate[where], out=output[where])
        block.mul_(up[where]).mul_(f[whose].unsqueeze(-2))
    return output


def eager_backward(
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


# The operator

INPUTS = "Tensor gate, Tensor up, Tensor f, Tensor? cu_seqlens, str backend"
FORWARD, BACKWARD = "mitrain_kernels::infused_swiglu", "mitrain_kernels::infused_swiglu_backward"
torch.library.define(FORWARD, f"({INPUTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    BACKWARD, f"(Tensor grad, {INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)


def compute(gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    check_bounds(gate, cu_seqlens)
    forward, _ = implementation(gate, backend)
    return forward(gate, up, f, cu_seqlens)


def compute_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, backend: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and f; an empty tensor stands for one that ``needs`` does not ask for."""
    _, backward = implementation(gate, backend)
    return backward(grad, gate, up, f, cu_seqlens, needs)


torch.library.impl(FORWARD, "default", compute)
torch.library.impl(BACKWARD, "default", compute_gradients)


@torch.library.register_fake(FORWARD)
def fake(gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake(BACKWARD)
def fake_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, backend: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dgate, dup, df = (x.new_empty(x.shape if n else 0) for x, n in zip((gate, up, f), needs, strict=True))
    return dgate, dup, df


def remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, f, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(gate, up, f, cu_seqlens)


def differentiate(ctx: Any, grad: Tensor, backward: Callable[..., Gradients] | None = None) -> Gradients:
    needs = list(ctx.needs_input_grad[:3])
    backward = backward or torch.ops.mitrain_kernels.infused_swiglu_backward.default
    gradients = backward(grad, *ctx.saved_tensors, ctx.backend, needs)
    return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), None, None


def refuse(ctx: Any, *grads: Tensor) -> Gradients:
    raise RuntimeError("infused_swiglu has no second derivative: use backend='reference', or no create_graph=True")


class Recorded(torch.autograd.Function):
    """The operator without torch's library around it, whose Python costs more than small shapes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = compute(*inputs)
        remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return differentiate(ctx, grad, None if torch.is_grad_enabled() else compute_gradients)


torch.library.register_autograd(FORWARD, differentiate, setup_context=remember)
torch.library.register_autograd(BACKWARD, refuse)
