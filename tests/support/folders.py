"""Folders as users have them: a tiny language model with its tokenizer, a tiny image encoder, a small data set."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from benchmarks.faults.world import COLOURS, WORDS, records
from benchmarks.faults.world import image_encoder as vision_folder
from benchmarks.faults.world import language_model as llm_folder
from benchmarks.faults.world import picture as colour_image

__all__ = ["COLOURS", "WORDS", "colour_image", "colour_records", "llm_folder", "vision_folder", "whisper_folder"]


@contextmanager
def colour_world(path: Path) -> Iterator[Path]:
    """A folder with tiny models and 12 coloured pictures, whose cache is its own while the context lasts."""
    llm_folder(path / "llm")
    vision_folder(path / "vision")
    colour_records(path / "data", train=12, val=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MITRAIN_CACHE", str(path / "cache"))
        yield path


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
