"""What the cases train on: a tiny language model with its tokenizer, a tiny image encoder, pictures of plain colours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mitrain.models import loading

WORDS = "the picture shows a red green blue yellow square on left right bottom is this thing colour of yes no".split()
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}
STEPS, EVERY = 8, 2
"""Steps of a run, and after how many of them it is evaluated and saved."""


def make(path: Path) -> Path:
    """Models, data and ``config.yaml`` under ``path``."""
    with loading.quiet():
        language_model(path / "llm")
        image_encoder(path / "vision")
    records(path / "data", {"train": 24, "val": 12, "test": 16})
    (path / "config.yaml").write_text(yaml.safe_dump(configuration(path)), encoding="utf-8")
    return path


def configuration(path: Path) -> dict[str, Any]:
    """Eight steps with everything random that a step may hold: augmentation, noise and dropout."""
    return {
        "model": {"llm": str(path / "llm"), "encoders": {"image": {"name": str(path / "vision"), "layer": 2}}},
        "adapter": {"name": "mit", "layers": [1, 2]},
        "features": {"views": 2, "noise": 0.05, "dropout": 0.1},
        "task": {"name": "answer"},
        "data": {"name": "records", "root": str(path / "data")},
        "train": {"steps": STEPS, "batch": 6, "lr": 1e-2, "eval_every": EVERY, "save_every": EVERY, "keep": 2,
                  "schedule": {"name": "constant"}},
    }  # fmt: skip


def language_model(path: Path, layers: int = 3, width: int = 32, seed: int = 0) -> Path:
    """A Llama with grouped-query heads and a tokenizer of words, written by save_pretrained."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def image_encoder(path: Path, layers: int = 3, width: int = 24, seed: int = 0) -> Path:
    """A DINOv2 for pictures of 28 pixels."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(path)
    return path


def records(path: Path, counts: dict[str, int]) -> Path:
    """Questions about the colour of noisy plain pictures: a JSONL file a split."""
    (path / "images").mkdir(parents=True)
    number = 0
    for split, count in counts.items():
        rows = []
        for _ in range(count):
            colour = list(COLOURS)[number % 4]
            picture(colour, number).save(path / "images" / f"{number}.png")
            rows.append(
                {
                    "id": f"{split}{number}",
                    "image": f"images/{number}.png",
                    "prompt": "the colour of this picture is",
                    "answer": colour,
                    "candidates": list(COLOURS),
                    "kind": "colour",
                    "object": f"{split}{number}",
                }
            )
            number += 1
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def picture(colour: str, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 12, (20, 24, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))
