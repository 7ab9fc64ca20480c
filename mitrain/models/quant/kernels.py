"""Where bitsandbytes' functional kernels are used, and what stands in for them: no other module imports that package.

    nf4 → float     bitsandbytes on CPU and GPU where it is installed; both paths round the same fp32 product
    int8 × int8     bitsandbytes on a GPU. On a CPU `torch._int_mm` with AVX-512, else fp32 in sums short enough to be
                    exact: without AVX-512 torch's own kernel is 26 times slower, and bitsandbytes' sums are not exact

Nothing here needs bitsandbytes, unless ``use("bitsandbytes")`` asks for it.
"""

import contextlib
import importlib
import logging
import math
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mitrain.core.errors import ConfigError, ModelError, need_extra
from mitrain.models.quant import formats

log = logging.getLogger(__name__)
CHOICES = ("auto", "torch", "bitsandbytes")
EXACT = 1024  # products of two int8 are at most 127², so the sum of 1024 of them is below 2²⁴, whole in fp32
_chosen = "auto"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Inside, the kernels are ``torch``'s, ``bitsandbytes``' (an error where it is missing), or the better of both."""
    global _chosen
    if name not in CHOICES:
        raise ConfigError(f"quantisation kernels {name!r} do not exist: choose one of {', '.join(CHOICES)}")
    if name == "bitsandbytes":
        need_extra("bitsandbytes", "quant", "its quantisation kernels")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Inside, the package ``kernels`` cannot be imported.

    On a CPU with AVX512-BF16 bitsandbytes asks it for compiled code from a hub while it is imported itself, and does
    without where it is not there.
    """
    held, logger = sys.modules.get("kernels"), logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    sys.modules["kernels"] = None
    logger.setLevel(logging.ERROR)  # it advises to install that package
    try:
        yield
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if held is not None:
            sys.modules["kernels"] = held


@cache
def bitsandbytes() -> ModuleType | None:
    """bitsandbytes' functional module, or None where it cannot be imported."""
    try:
        with nothing_fetched():
            return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # a build for another GPU or libc fails in many ways
        log.info("bitsandbytes is not used: %s", error)
        return None


@cache
def tell(what: str, kernel: str, device: str) -> None:
    """Log a choice the first time it is made."""
    log.info("%s on %s: %s", what, device, kernel)


def wanted() -> ModuleType | None:
    return None if _chosen == "torch" else bitsandbytes()


@cache
def unpacks(device: str, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes' nf4 kernel runs on this kind of device and agrees with the table, found by trying."""
    if device == "meta":  # nothing to agree with
        return False
    packed, absmax = torch.arange(80, dtype=torch.uint8, device=device), torch.tensor([1.0, 0.3, 7.0], device=device)
    try:
        unpacked = unpack(bitsandbytes(), packed, absmax, 64, 160, dtype)
    except Exception as error:  # no kernel for the device, no driver, another interface
        log.info("bitsandbytes' nf4 kernel does not run on %s: %s", device, error)
        return False
    return torch.equal(unpacked, formats.dequantise_blocks(packed, absmax, 64, 160, dtype))


def unpack(functional: ModuleType, packed: Tensor, absmax: Tensor, block: int, count: int, dtype: torch.dtype) -> Tensor:
    """Always as one flat row: of matrices whose rows are no multiple of the block, bitsandbytes 0.50.2 takes the scales
    of other blocks on a CPU with AVX-512.
    """
    out = torch.empty(count, dtype=dtype, device=packed.device)
    state = functional.QuantState(absmax=absmax, shape=out.shape, dtype=dtype, blocksize=block, quant_type="nf4")
    return functional.dequantize_4bit(packed, state)


def dequantise_nf4(packed: Tensor, absmax: Tensor, block: int, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` weights of whole blocks, (count,) in ``dtype``."""
    kind, functional = packed.device.type, wanted()
    absmax = absmax.float()
    if functional is not None and dtype != torch.float64 and count % 2 == 0 and unpacks(kind, dtype):
        tell("nf4", "bitsandbytes", kind)
        return unpack(functional, packed, absmax, block, count, dtype)
    tell("nf4", "torch", kind)
    return formats.dequantise_blocks(packed, absmax, block, count, dtype)


def check_four_bit(model: nn.Module) -> None:
    """ModelError where a matrix of ``model`` lies on a CPU in bitsandbytes' own 4 bits that it gets wrong there.

    Rows of whole blocks are right everywhere; others are measured, for no flag of the CPU tells what was compiled.
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None or weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
            continue
        if is_wrong(state.shape[-1], state.blocksize):
            raise ModelError(
                f"{name} of {type(model).__name__} is held in 4 bits by bitsandbytes, which computes rows of"
                f" {state.shape[-1]} wrongly on this CPU (mitrain doctor): load the model in floats or on a GPU, or train it"
                " with model.quantize=nf4"
            )


@cache
def is_wrong(columns: int, block: int) -> bool:
    functional = bitsandbytes()
    return functional is not None and not nf4_error(functional, columns, block) <= TOLERANCE


TOLERANCE = 1e-5
NF4_COLUMNS = (32, 64, 96, 128, 160, 576)


def nf4_fault() -> dict[str, Any] | None:
    """What bitsandbytes' nf4 kernel makes of matrices on this CPU, where it is not the format's definition; else None."""
    functional = bitsandbytes()
    errors = {} if functional is None else {n: nf4_error(functional, n) for n in NF4_COLUMNS}
    wrong = {n: error for n, error in errors.items() if not error <= TOLERANCE}
    if not wrong:
        return None
    return {
        "package": "bitsandbytes",
        "what": "bitsandbytes' dequantize_4bit is wrong on this CPU for matrices of these columns:",
        "measured": ", ".join(f"{n} (off by {error:.2g})" for n, error in wrong.items()),
        "columns": list(wrong),
        "means": "mitrain hands it flat rows alone and is right; transformers' own 4-bit models are wrong here, and refused",
    }


def nf4_error(functional: ModuleType, columns: int, block: int = formats.NF4_BLOCK) -> float:
    """The largest difference to the definition in float64, of 48 rows of N(0, 1); infinite where it does not run."""
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(0))
    packed, absmax = formats.quantise_blocks(weight, block)
    exact = formats.dequantise_blocks(packed, absmax, block, weight.numel(), torch.float64)
    state = functional.QuantState(absmax=absmax, shape=weight.shape, dtype=torch.float32, blocksize=block, quant_type="nf4")
    try:
        unpacked = functional.dequantize_4bit(packed, state)
    except Exception as error:  # another interface, or a library that does not load
        log.info("bitsandbytes' nf4 kernel does not run: %s", error)
        return math.inf
    return float((unpacked.double().reshape(-1) - exact).abs().max())


def int8_product(x: Tensor, payload: Tensor) -> Tensor:
    """x (N, in) int8, payload (out, in) int8 → x payloadᵀ (N, out) int32, exact."""
    kind = x.device.type
    if kind == "cuda" and wanted() is not None:
        tell("int8 x int8", "bitsandbytes", kind)
        return wanted().int8_linear_matmul(x, payload)
    if has_int_mm(x, payload):
        tell("int8 x int8", "torch._int_mm", kind)
        return torch._int_mm(x, payload.t())
    tell("int8 x int8", "fp32 in exact parts", kind)
    return exact_product(x, payload)


def has_int_mm(x: Tensor, payload: Tensor) -> bool:
    """Whether torch's int8 product runs here, and fast."""
    if x.device.type == "cuda":  # cuBLAS's conditions
        return len(x) > 16 and x.shape[1] % 8 == 0 and len(payload) % 8 == 0
    return x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def exact_product(x: Tensor, payload: Tensor) -> Tensor:
    """As int32 (N, out)."""
    out = torch.zeros(len(x), len(payload), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT):
        part = slice(start, start + EXACT)
        out += (x[:, part].float() @ payload[:, part].float().t()).int()
    return out
