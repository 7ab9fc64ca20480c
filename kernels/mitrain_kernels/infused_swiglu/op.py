"""``infused_swiglu``: one operator of torch for all backends, with its own backward pass."""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mitrain_kernels.infused_swiglu import eager
from mitrain_kernels.infused_swiglu.reference import infused_swiglu_reference

BACKENDS = ("auto", "reference", "torch", "triton")
Gradients = tuple[Tensor | None, ...]
logger = logging.getLogger(__name__)


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
    elif importlib.util.find_spec("triton") is None:
        choice, reason = "torch", "triton is not installed"
    else:
        choice, reason = "triton", "tensors are on a GPU"
    logger.info("infused_swiglu runs on the backend %r: %s", choice, reason)
    return choice


def implementation(gate: Tensor, backend: str) -> Any:
    """The module whose ``forward`` and ``backward`` serve ``gate``."""
    if backend == "auto":
        backend = automatic(gate.device.type, gate.dtype == torch.float64)
    if backend == "torch":
        return eager
    from mitrain_kernels.infused_swiglu import triton_kernel

    triton_kernel.check(gate)
    return triton_kernel


INPUTS = "Tensor gate, Tensor up, Tensor f, Tensor? cu_seqlens, str backend"
FORWARD, BACKWARD = "mitrain_kernels::infused_swiglu", "mitrain_kernels::infused_swiglu_backward"
torch.library.define(FORWARD, f"({INPUTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    BACKWARD,
    f"(Tensor grad, {INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def compute(gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    check_bounds(gate, cu_seqlens)
    return implementation(gate, backend).forward(gate, up, f, cu_seqlens)


def compute_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, f: Tensor, cu_seqlens: Tensor | None, backend: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and f; an empty tensor stands for one that ``needs`` does not ask for."""
    return implementation(gate, backend).backward(grad, gate, up, f, cu_seqlens, needs)


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
