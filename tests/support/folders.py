"""Folders as users have them: a tiny language model with its tokenizer, a tiny image encoder, a small data set."""

from pathlib import Path

from benchmarks.faults.world import COLOURS, WORDS, records
from benchmarks.faults.world import image_encoder as vision_folder
from benchmarks.faults.world import language_model as llm_folder
from benchmarks.faults.world import picture as colour_image

__all__ = ["COLOURS", "WORDS", "colour_image", "colour_records", "llm_folder", "vision_folder"]


def colour_records(path: Path, train: int = 48, val: int = 16) -> Path:
    """Questions about the colour of pictures, in train.jsonl, val.jsonl and test.jsonl."""
    return records(path, {"train": train, "val": val, "test": val})
