"""The shapes that are measured, and random inputs for them.

Attention: B batch, H query heads, G key/value heads, T tokens (keys), d head width, M modalities; queries are the last
``queries`` of the T tokens. SwiGLU: B batch, T tokens, F feed-forward width.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

OPS = ("infused_attention", "infused_swiglu")
MODES = ("forward", "backward", "both")
DIMENSIONS = {"infused_attention": ("B", "H", "G", "T", "d"), "infused_swiglu": ("B", "T", "F")}
SEED = 0


@dataclass(frozen=True)
class Case:
    """One row group of the results: a shape, its type and what is special about it."""

    op: str
    shape: dict[str, int]
    dtype: str = "float32"
    modalities: int = 1
    padded: bool = False
    queries: int | None = None
    gate: str = "prefix"

    @property
    def variant(self) -> str:
        """What sets the case apart from its op's usual one: '' | 'decode' | 'M=3' | 'padded'."""
        words = [f"M={self.modalities}"] * (self.modalities != 1) + ["padded"] * self.padded
        return " ".join(words + ["decode"] * (self.queries == 1))

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[:1] if self.queries == 1 else MODES

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.op} {shape_text(self.shape)} {self.dtype} {self.variant}".strip()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def shape_text(shape: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def parse_shape(text: str) -> dict[str, int]:
    """'B=1 H=4' or 'B=1,H=4' to {'B': 1, 'H': 4}."""
    pairs = (item.split("=") for item in text.replace(",", " ").split())
    return {name: int(size) for name, size in pairs}


def attention(B: int, H: int, G: int, T: int, d: int, **options: Any) -> Case:
    return Case("infused_attention", {"B": B, "H": H, "G": G, "T": T, "d": d}, **options)


def swiglu(B: int, T: int, F: int, **options: Any) -> Case:
    return Case("infused_swiglu", {"B": B, "T": T, "F": F}, **options)


def cases_for(op: str, device: str, quick: bool = False) -> list[Case]:
    """CPU: shapes of SmolLM2-135M (H9 G3 d64, F1536) and LLaMA-2-7B in fp32. CUDA: of a Llama-3-8B layer in bf16."""
    small = [attention(4, 9, 3, T, 64) for T in (128, 512)] if op == OPS[0] else [swiglu(4, T, 1536) for T in (128, 512)]
    if device == "cpu":
        return small if quick else small + larger_on_cpu(op)
    lengths = (128, 512) if quick else (128, 256, 512, 1024, 2048, 4096, 8192)
    if op == "infused_swiglu":
        found = [swiglu(4, T, 14336) for T in lengths] + [swiglu(1, 8192, 14336)] * (not quick)
    else:
        found = [attention(4, 32, 8, T, 128) for T in lengths]
        found += [] if quick else rare_on_cuda()
    return [replace(case, dtype="bfloat16") for case in found]


def larger_on_cpu(op: str) -> list[Case]:
    if op == "infused_swiglu":
        return [swiglu(1, 1024, 11008)]
    usual = attention(4, 9, 3, 512, 64)
    return [attention(1, 32, 32, 1024, 128), replace(usual, modalities=3), replace(usual, padded=True)]


def rare_on_cuda() -> list[Case]:
    usual = attention(4, 32, 8, 2048, 128)
    decode = [attention(B, 32, 8, T, 128, queries=1) for B, T in ((1, 2048), (32, 2048), (1, 8192))]
    return [attention(1, 32, 8, 8192, 128), replace(usual, modalities=3), replace(usual, padded=True), *decode]


def key_padding(case: Case, device: str) -> Tensor | None:
    """(B, T), True for a token: the samples end at different places, the first one is full."""
    if not case.padded:
        return None
    B, T = case.shape["B"], case.shape["T"]
    lengths = torch.tensor([T - b * T // (2 * B) for b in range(B)], device=device)
    return torch.arange(T, device=device) < lengths[:, None]


def make_inputs(case: Case, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """The op's differentiable inputs by name, and the gradient that arrives at its output; the same in every process."""
    shapes, out = attention_shapes(case) if case.op == "infused_attention" else swiglu_shapes(case)
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda shape: torch.randn(shape, generator=generator).to(device, case.torch_dtype)  # noqa: E731
    inputs = {name: draw(shape) for name, shape in shapes.items()}
    trains = "backward" in case.modes
    return {name: x.requires_grad_(trains) for name, x in inputs.items()}, draw(out)


def attention_shapes(case: Case) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    B, H, G, T, d = case.shape.values()
    M, out = case.modalities, (B, H, case.queries or T, d)
    maps = dict.fromkeys(("k_mul", "v_mul", "v_add"), (M, B, H, d))
    return {"q": out, "k": (B, G, T, d), "v": (B, G, T, d), **maps, "head_logit": (M, H)}, out


def swiglu_shapes(case: Case) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    B, T, F = case.shape.values()
    return {"gate": (B, T, F), "up": (B, T, F), "f": (B, F)}, (B, T, F)
