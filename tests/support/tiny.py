"""Tiny random language models of every architecture that infusion is tested on, and small inputs for them."""

import inspect

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mitrain.models.layouts import CACHES

CACHE = next(name for name in CACHES if name in inspect.signature(LlamaForCausalLM.forward).parameters)
VOCABULARY, WIDTH, DEPTH, WINDOW = 67, 32, 4, 4
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 16}  # heads × head_dim is not the hidden size

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, GROUPED),
    "qwen2": (Qwen2Config, GROUPED),
    "qwen3": (Qwen3Config, WIDE_HEADS),
    "mistral": (MistralConfig, {**GROUPED, "sliding_window": WINDOW}),
    "gemma": (GemmaConfig, {**WIDE_HEADS, "num_key_value_heads": 1}),
    "gemma2": (Gemma2Config, {**WIDE_HEADS, "sliding_window": WINDOW, "attn_implementation": "eager"}),
    "gemma3": (
        Gemma3TextConfig,
        {
            **WIDE_HEADS,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gpt_neox": (GPTNeoXConfig, COMMON),
}
NAMES = list(CONFIGS)


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A causal language model with random weights, in eval mode."""
    kind, values = CONFIGS[name]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(kind(**{**values, **changes}), dtype=dtype).eval()


def text(rows: int = 3, tokens: int = 9, padding: str | None = None, seed: int = 1) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``; ``padding`` left or right hides 4 tokens of row 0 and 2 of row 1."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, hidden in ((0, 4), (1, 2)) if padding else ():
        mask[row, slice(0, hidden) if padding == "left" else slice(tokens - hidden, tokens)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def features(rows: int = 3, width: int = 6, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def scramble(module: torch.nn.Module, seed: int = 3, spread: float = 0.3) -> None:
    """Random parameters, so that an adapter leaves its identity init."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * spread)
