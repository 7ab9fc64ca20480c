"""What is timed. ``plain`` is the baseline: the same operator without infusion, which every ratio is relative to.

    infused_attention   plain      torch's attention, keys and values as they are
                        eager      the authors' release: repeat K and V per query head, write infused K and V out,
                                   one gate per sequence, softmax by hand (its k_add, which has no effect, left out)
                        reference  the definition, per query: only where it fits into memory
                        compile    torch.compile of eager
                        sdpa, flash, flex, triton   this package's backends
    infused_swiglu      plain, eager, compile; torch, triton: this package's backends

A provider of one's own is ``file.py:function``; it is called like the op itself, without ``backend``.
"""

import importlib.util
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mitrain_kernels.infused_attention import infused_attention, infused_attention_reference, prefix_sums
from mitrain_kernels.infused_swiglu import infused_swiglu
from torch import Tensor

from bench.cases import Case, key_padding

NAMES = {
    "infused_attention": ("plain", "eager", "reference", "compile", "sdpa", "flash", "flex", "triton"),
    "infused_swiglu": ("plain", "eager", "compile", "torch", "triton"),
}
CUDA_ONLY = ("flash", "flex", "triton")
CPU_BYTES = 6 << 30


class Provider(NamedTuple):
    """run(**inputs) for the named inputs; ``gate`` is the attention gate that it computes, "off" without infusion."""

    run: Callable[..., Tensor]
    inputs: tuple[str, ...]
    gate: str


def names_for(op: str, wanted: str | None) -> list[str]:
    """The providers asked for, the baseline always first; by default all of them."""
    chosen = wanted.split(",") if wanted else list(NAMES[op])
    return ["plain", *(name for name in chosen if name != "plain" and (name in NAMES[op] or ":" in name))]


def why_absent(name: str, op: str, device: str, quick: bool) -> str | None:
    """Why the provider is not measured here at all; None if it is."""
    if name in CUDA_ONLY and device != "cuda":
        return "needs a GPU"
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if name in ("compile", "reference") and quick:
        return "left out by --quick"
    if name == "compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "needs a C++ compiler"
    return None


def why_too_large(name: str, case: Case, device: str) -> str | None:
    """Why one case is left out for a provider that writes out T² (eager) or T²·d (reference) numbers."""
    if case.op != "infused_attention" or name not in ("eager", "compile", "reference"):
        return None
    B, H, _, T, d = case.shape.values()
    scores = B * H * (case.queries or T) * T * case.torch_dtype.itemsize
    need = 14 * scores * d * case.modalities if name == "reference" else 6 * scores
    room = CPU_BYTES if device == "cpu" else torch.cuda.get_device_properties(0).total_memory // 3
    return None if need <= room else f"would take about {need / 2**30:.0f} GiB"


def make_provider(name: str, case: Case, device: str) -> Provider:
    if case.op == "infused_swiglu":
        return make_swiglu(name)
    padding = key_padding(case, device)
    options = {"gate": case.gate, "causal": True, **({} if padding is None else {"key_padding": padding})}
    inputs = ("q", "k", "v", "k_mul", "v_mul", "v_add", "head_logit")
    if name == "plain":
        return Provider(plain_attention(case, padding), inputs[:3], "off")
    if name in ("eager", "compile"):
        run = partial(eager_attention, seen=visible(case, padding, device), valid=padding)
        return Provider(compiled(run) if name == "compile" else run, inputs, "sequence")
    if name == "reference":
        return Provider(partial(infused_attention_reference, **options), inputs, case.gate)
    if ":" in name:
        return Provider(partial(load_function(name), **options), inputs, case.gate)
    run = partial(infused_attention, backend=name, **options)
    return Provider(decoding(run) if case.queries == 1 else run, inputs, case.gate)


def decoding(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op as a decoder calls it: the gate's sums of the earlier tokens are carried along, made on the first call."""
    earlier: list[Any] = []

    def run(v: Tensor, v_add: Tensor, **rest: Tensor) -> Tensor:
        if not earlier:
            earlier.append(prefix_sums(v[:, :, :-1], v_add).last())
        return op(v=v, v_add=v_add, state_in=earlier[0], **rest)

    return run


def make_swiglu(name: str) -> Provider:
    inputs = ("gate", "up", "f")
    if name == "plain":
        return Provider(plain_swiglu, inputs[:2], "off")
    if name in ("eager", "compile"):
        return Provider(compiled(eager_swiglu) if name == "compile" else eager_swiglu, inputs, "none")
    run = load_function(name) if ":" in name else partial(infused_swiglu, backend=name)
    return Provider(run, inputs, "none")


def compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(run, dynamic=False)


def load_function(name: str) -> Callable[..., Tensor]:
    """``file.py:function`` of somebody else."""
    path, function = name.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def visible(case: Case, padding: Tensor | None, device: str) -> Tensor:
    """(B or 1, 1, queries, T) bool, made once as a model makes its mask."""
    T, queries = case.shape["T"], case.queries or case.shape["T"]
    seen = torch.ones(queries, T, dtype=torch.bool, device=device).tril(T - queries)[None, None]
    return seen if padding is None else seen & padding[:, None, None]


def plain_attention(case: Case, padding: Tensor | None) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"enable_gqa": case.shape["H"] != case.shape["G"]}
    if padding is not None:
        options["attn_mask"] = visible(case, padding, str(padding.device))
    elif case.queries != 1:
        options["is_causal"] = True
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_mul: Tensor,
    v_mul: Tensor,
    v_add: Tensor,
    head_logit: Tensor,
    *,
    seen: Tensor,
    valid: Tensor | None,
) -> Tensor:
    """K + Σ g (K ⊙ k_mul) and V + Σ g (V ⊙ v_mul + v_add), written out; g = σ(L + cos) over the whole sequence."""
    heads = q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    tokens = v if valid is None else v * valid[:, None, :, None]
    k_infused, v_infused = k, v
    for m in range(k_mul.shape[0]):
        added = v_add[m, :, :, None].expand_as(v)
        compared = added if valid is None else added * valid[:, None, :, None]
        cosine = F.cosine_similarity(tokens.flatten(2), compared.flatten(2), dim=-1)
        gate = torch.sigmoid(head_logit[m] + cosine)[..., None, None]
        k_infused = k_infused + gate * (k * k_mul[m, :, :, None])
        v_infused = v_infused + gate * (v * v_mul[m, :, :, None] + added)
    scores = (q @ k_infused.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v_infused


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def eager_swiglu(gate: Tensor, up: Tensor, f: Tensor) -> Tensor:
    return F.silu(gate) * up * f[:, None]
