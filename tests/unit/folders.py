"""Folders as users have them: a tiny language model with its tokenizer, a tiny image encoder, a small data set."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the picture shows a red green blue yellow square on left right bottom is this thing colour of yes no".split()
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}


def llm_folder(path: Path, layers: int = 3, width: int = 32, seed: int = 0) -> Path:
    """A Llama with grouped-query heads and a word tokenizer, written by save_pretrained."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
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
    fast.save_pretrained(path)
    return path


def vision_folder(path: Path, layers: int = 3, width: int = 24, seed: int = 0) -> Path:
    """A DINOv2 of 3 layers for images of 28 pixels."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(path)
    return path


def colour_image(colour: str, seed: int) -> Image.Image:
    """A noisy plain picture of a colour."""
    noise = np.random.default_rng(seed).normal(0, 12, (20, 24, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def colour_records(path: Path, train: int = 48, val: int = 16) -> Path:
    """Questions about the colour of pictures, in train.jsonl, val.jsonl and test.jsonl."""
    (path / "images").mkdir(parents=True)
    number = 0
    for split, count in (("train", train), ("val", val), ("test", val)):
        rows = []
        for _ in range(count):
            colour = list(COLOURS)[number % 4]
            colour_image(colour, number).save(path / "images" / f"{number}.png")
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
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
