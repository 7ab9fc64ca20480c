"""Folders as users have them: a tiny language model with its tokenizer, a tiny image encoder, a small data set."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from benchmarks.faults.world import COLOURS, WORDS, records
from benchmarks.faults.world import image_encoder as vision_folder
from benchmarks.faults.world import language_model as llm_folder
from benchmarks.faults.world import picture as colour_image

__all__ = ["COLOURS", "WORDS", "colour_image", "llm_folder", "vision_folder"]  # under the names that tests know


@contextmanager
def own_cache(path: Path) -> Iterator[Path]:
    """The folder ``path``, in which mitrain's cache lies while the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MITRAIN_CACHE", str(path / "cache"))
        yield path


def colour_world(path: Path, train: int = 12, val: int = 4, **sizes: int) -> AbstractContextManager[Path]:
    """The folder of `colour_folder`, with a cache of its own."""
    return own_cache(colour_folder(path, train, val, **sizes))


def colour_folder(path: Path, train: int = 12, val: int = 4, layers: int = 3, width: int = 32) -> Path:
    """Tiny models (``width``: of the language model) in llm/ and vision/, and pictures with questions in data/."""
    llm_folder(path / "llm", layers, width)
    vision_folder(path / "vision", layers)
    colour_records(path / "data", train, val)
    return path


def run_settings(world: Path, vision: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A run of MiT on what `colour_folder` makes. ``sections`` stand in place of these; ``vision``: of the encoder."""
    encoder = {"name": str(world / "vision"), **(vision or {})}
    return {
        "model": {"llm": str(world / "llm"), "encoders": {"image": encoder}},
        "adapter": {"name": "mit", "layers": [1]},
        "task": {"name": "answer"},
        "data": {"name": "records", "root": str(world / "data")},
    } | sections


def rewrite(data: Path, change: Callable[[dict[str, Any]], dict[str, Any]], files: str = "") -> dict[str, str]:
    """Each split's rows as ``change`` makes them, in its own file or in one whose name ``files`` begins; their names."""
    names = {split: f"{files}{split}.jsonl" for split in ("train", "val", "test")}
    for split, name in names.items():
        rows = [change(json.loads(line)) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return names


def as_label(row: dict[str, Any]) -> dict[str, Any]:
    """A question's picture with its answer as a label."""
    return {"image": row["image"], "text": "this thing is", "label": row["answer"], "object": row["object"]}


def colour_records(path: Path, train: int = 48, val: int = 16) -> Path:
    """Questions about the colour of pictures, in train.jsonl, val.jsonl and test.jsonl."""
    return records(path, {"train": train, "val": val, "test": val})


def whisper_folder(path: Path) -> Path:
    """A speech encoder of two layers of width 16, with its feature extractor."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 16}
    WhisperModel(WhisperConfig(**sizes, vocab_size=60, max_source_positions=100, pad_token_id=0)).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=16).save_pretrained(path)
    return path


def bert_folder(path: Path, **settings: Any) -> Path:
    """A BERT of three layers of width 32, with a tokenizer of `WORDS` between [CLS] and [SEP]."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, **settings}
    BertModel(BertConfig(**shape, vocab_size=len(vocabulary), max_position_embeddings=64)).save_pretrained(path)
    return path
