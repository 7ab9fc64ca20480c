"""Triton kernels compiled to machine code for a GPU that is not there: neither a device nor a driver is needed.

A ``Case`` is one kernel at one entry of its table of tiles. Each op lists its cases for a target in
``audit_cases(target)``; ``aot.py`` compiles them here and ``audit.py`` reads what came out.
"""

import importlib
import os
from dataclasses import dataclass, field, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

# Target → (backend, architecture, lanes per warp).
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),  # A100
    "sm_86": ("cuda", 86, 32),  # RTX 30; its tiles also serve RTX 40 and 50, which have as little shared memory
    "sm_90": ("cuda", 90, 32),  # H100, H200; Triton compiles it as sm_90a
    "sm_100": ("cuda", 100, 32),  # B200
    "gfx942": ("hip", "gfx942", 64),  # MI300
}


@dataclass(frozen=True)
class Case:
    """One kernel with everything that its machine code depends on.

    where:
        kernel: the function under ``triton.jit``; a "module:name" string stands for it between processes.
        signature: Triton's type of every argument that is no constexpr, e.g. "*bf16", "i32", "fp32".
        constants: the value of every constexpr argument.
        head_dim: the head width, 0 where the kernel has none. dtype: of the tensors, "bf16", "fp16" or "fp32".
        aligned: integer arguments that are multiples of 16, as the launcher would find; pointers always are.
        dots: the kernel has a bf16 or fp16 dot, which must reach the tensor cores.
        bound_by_memory: its dots take less time than its loads, even where warps repeat each other.
        options: further compile options of Triton, e.g. {"maxnreg": 128}.
        useful: the share of its dots that do not repeat another loop's.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    head_dim: int
    dtype: str
    aligned: tuple[str, ...] = ()
    dots: bool = True
    bound_by_memory: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    useful: float = 1.0


def portable(case: Case) -> Case:
    """The case with its kernel named instead of held, so that another process can be sent it."""
    return replace(case, kernel=f"{case.kernel.fn.__module__}:{case.kernel.fn.__name__}")


def resolved(case: Case) -> Case:
    """The inverse of ``portable``."""
    module, name = case.kernel.split(":")
    return replace(case, kernel=getattr(importlib.import_module(module), name))


def interpreted() -> bool:
    """Whether ``triton.jit`` makes interpreted functions in this process, which no compiler takes."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def source_of(case: Case) -> ASTSource:
    """What ``triton.compile`` starts from, with arguments specialised as the launcher would."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    multiples_of_16 = [
        (index,) for index, name in enumerate(names) if name in case.aligned or signature[name].startswith("*")
    ]
    attrs = {index: [["tt.divisibility", 16]] for index in multiples_of_16}
    return ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attrs)


def compile_case(case: Case, target: str) -> CompiledKernel:
    """Machine code of the case; a·b + c is fused in one rounding, as the launchers ask (Triton's default varies)."""
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True, **case.options}
    return triton.compile(source_of(case), target=GPUTarget(*TARGETS[target]), options=options)
