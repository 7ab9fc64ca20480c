"""Runs a page of docs/tutorials as its reader would: its Python, its commands, in their order, in one folder."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from folders import llm_folder, vision_folder
from source_tree import ROOT
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from mitrain.cli import main
from mitrain.core import prepared

BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.S)
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, code) of the page's blocks that are to be run."""
    yield from BLOCK.findall((ROOT / "docs" / "tutorials" / f"{page}.md").read_text(encoding="utf-8"))


def follow(page: str, run: dict[str, Callable[[list[str]], None]], change: Callable[[str], str] = str) -> int:
    """Run a page in the current folder; ``run``: what runs the commands of other programs than mitrain, by their names, and
    "mitrain serve". Returns how many commands there were."""
    count, scope = 0, {}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(change(code), page, "exec"), scope)
            continue
        for line in change(code).splitlines():
            words = shlex.split(line, comments=True)
            one = run.get(" ".join(words[:2])) or run.get(words[0])
            if one is not None:
                one(words)
            else:
                assert words[0] == "mitrain" and main(words[1:]) == 0, line
            count += 1
    return count


def stand_ins(cache: Path) -> Path:
    """A cache of mitrain in which tiny random models lie under the names of the prepared ones that `init` takes."""
    models = cache / "models"
    llm = llm_folder(models / "smollm2-135m-instruct", width=48)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(llm)
    vision_folder(models / "dinov2-vits14")
    whisper = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60}
    whisper |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 16}
    WhisperModel(WhisperConfig(**whisper, max_source_positions=100, pad_token_id=0)).save_pretrained(models / "whisper-base")
    WhisperFeatureExtractor(feature_size=16).save_pretrained(models / "whisper-base")
    for folder in models.iterdir():
        made = {"recipe_version": prepared.find("models", folder.name).version, "archives": []}
        (folder / "provenance.json").write_text(json.dumps(made))
    return cache
