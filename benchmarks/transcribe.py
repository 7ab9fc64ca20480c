"""``mitrain bench transcribe``: the words that a whole Whisper hears in prepared speech, beside those that its table says.

What shows that converted weights are right: encoder and decoder, by greedy steps of transformers, on 30 s of which the clip
is the beginning (in a shorter context the decoder says some clips' words again and again). Word error rate: substitutions,
insertions and deletions over the words of the truth, in lower case and without punctuation.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from mitrain.core import markdown, parsing
from mitrain.core.errors import DataError, UserError
from mitrain.core.prepared import ensure_data, ensure_model
from mitrain.core.provenance import made_with, sentence
from mitrain.data.audio import read_audio
from mitrain.models import loading

DATA, LIMIT = "dialogue", 0.15
FEWEST = 4  # different words of a line that is taken: laughter ("ha ha ha ha") has no spelling to be right about
COLUMNS = ("clips", "words", "wrong", "word error rate", "verdict")


class TranscribeError(UserError):
    """The word error rate is above the limit; everything has been written."""

    exit_code = 1


def measured(name: str, clips: int, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """What the prepared Whisper ``name`` hears in so many ``clips`` of the test split, spread evenly over it."""
    folder = ensure_data(DATA)
    rows = [row for row in lines(folder) if len(set(plain(row["text"]).split())) >= FEWEST]
    if clips > len(rows):
        raise DataError(f"{DATA} has {len(rows)} lines of {FEWEST} different words or more in its test split: ask for fewer")
    path = ensure_model(name)
    model = loading.load(WhisperForConditionalGeneration, path, "whole Whisper", dtype=torch.float32).eval()
    processor = loading.load(WhisperProcessor, path, "processor")
    heard = []
    for row in (rows[i * len(rows) // clips] for i in range(clips)):
        words = plain(transcribed(model, processor, folder, row["speech"]))
        truth = plain(row["text"])
        heard.append({"id": row["id"], "heard": words, "words": len(truth.split()), "wrong": wrong(words, truth)})
        say(f"{row['id']}: {words}")
    return {"model": name, "made": {"command": command, **made_with(("torch", "transformers"))}, "clips": heard}


def lines(folder: Path) -> list[dict[str, str]]:
    return [parsing.parse_json(line) for line in (folder / "test.jsonl").read_text().splitlines()]


def plain(text: str) -> str:
    """``text`` in lower case, without punctuation."""
    return " ".join(re.findall(r"\w[\w']*", text.lower()))


@torch.no_grad()
def transcribed(model: Any, processor: Any, folder: Path, file: str) -> str:
    """The words in a clip, by greedy steps."""
    rate = processor.feature_extractor.sampling_rate
    samples = read_audio(folder, file).at(rate)
    frames = processor.feature_extractor(samples, sampling_rate=rate, return_tensors="pt").input_features
    asked = {"language": "en", "task": "transcribe"} if model.generation_config.is_multilingual else {}
    said = model.generate(frames, **asked)
    return processor.batch_decode(said, skip_special_tokens=True)[0]


def wrong(heard: str, truth: str) -> int:
    """The fewest substitutions, insertions and deletions of words from one to the other (Levenshtein)."""
    row = list(range(len(truth.split()) + 1))
    for i, word in enumerate(heard.split(), 1):
        last, row = row, [i]
        for j, other in enumerate(truth.split(), 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (word != other)))
    return row[-1]


def rate_of(heard: Sequence[dict[str, Any]]) -> float:
    return sum(one["wrong"] for one in heard) / sum(one["words"] for one in heard)


def table(found: dict[str, Any]) -> str:
    heard, rate = found["clips"], rate_of(found["clips"])
    sums = [f"{sum(one[key] for one in heard):,}" for key in ("words", "wrong")]
    row = [str(len(heard)), *sums, f"{rate:.3f}", "ok" if rate <= LIMIT else f"above {LIMIT}"]
    note = (
        f"{found['model']} on lines of {FEWEST} different words or more of the test split of {DATA}, by greedy steps, told"
        f" that they are English. Limit: {LIMIT}. {sentence(found['made'])}"
    )
    return "\n".join([*markdown.table(COLUMNS, [row]), "", note, ""])


def check(found: dict[str, Any]) -> None:
    if (rate := rate_of(found["clips"])) > LIMIT:
        raise TranscribeError(f"the word error rate is {rate:.3f}, {LIMIT} are allowed")
