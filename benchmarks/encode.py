"""``mitrain bench encode``: from files of sound to features, beside the encoder's bare forward passes on as many frames.

Clips of two seconds are read, resampled, preprocessed (in threads, a little ahead) and encoded by a Whisper encoder of
random weights; the bare passes run it in batches of the same size on spectrograms that are there already. Both take turns, a
few batches each, so that whatever else the machine does falls on both.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from mitrain.core import markdown
from mitrain.core.errors import UserError
from mitrain.core.provenance import made_with, sentence
from mitrain.data.audio import read_audio
from mitrain.data.index import ahead
from mitrain.models.encoders import AudioConfig, AudioEncoder
from mitrain.models.encoders.audio import short_context

SECONDS, RATE = 2.0, 22_050
BATCH, TURN = 8, 40  # clips
LIMIT = 1.3
BASE = {"model_type": "whisper", "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048, "decoder_layers": 1}  # fmt: skip
TINY = {**BASE, "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
COLUMNS = ("clips", "features s", "bare passes s", "ratio", "clips / s", "verdict")


class EncodeError(UserError):
    """Features take longer than the limit; everything has been written."""

    exit_code = 1


def measured(clips: int, shape: dict[str, Any], command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Seconds for the features of so many ``clips``, and for the bare passes."""
    encoder, seconds = random_encoder(shape), {"features": 0.0, "bare": 0.0}
    with tempfile.TemporaryDirectory(prefix="mitrain-encode-") as folder:
        files = [clip(Path(folder), number) for number in range(clips)]
        features(encoder, Path(folder), files[:BATCH])  # what is computed at the first call alone is not timed
        bare(encoder, BATCH)
        for turn in batches(files, TURN):
            taken = {
                "features": timed(partial(features, encoder, Path(folder), turn)),
                "bare": timed(partial(bare, encoder, len(turn))),
            }
            seconds = {name: seconds[name] + taken[name] for name in seconds}
            say(", ".join(f"{name} {taken[name]:.2f} s" for name in taken))
    made = {"command": command, **made_with(("torch", "transformers", "soundfile", "soxr"))}
    size = sum(p.numel() for p in encoder.parameters())
    return {"made": made, "clips": clips, "parameters": size, "cores": os.cpu_count(), "seconds": seconds}


def random_encoder(shape: dict[str, Any]) -> AudioEncoder:
    encoder = AudioEncoder(AudioConfig(name="random", shape=shape, pool="mean+std"), None)
    torch.manual_seed(0)
    encoder.model.to_empty(device="cpu")
    for tensor in encoder.model.state_dict().values():
        tensor.normal_(0, 0.02)
    return encoder


def clip(folder: Path, number: int) -> str:
    name, samples = f"{number}.wav", np.random.default_rng(number).standard_normal(round(SECONDS * RATE))
    soundfile.write(folder / name, 0.1 * samples, RATE)
    return name


def features(encoder: AudioEncoder, folder: Path, files: Sequence[str]) -> None:
    drawn = ahead(lambda name: encoder.preprocess(read_audio(folder, name)), files)
    for batch in batches(drawn, BATCH):
        encoder.encode(batch)


def bare(encoder: AudioEncoder, clips: int) -> None:
    positions = round(SECONDS * encoder.settings.max_source_positions / 30)
    for batch in batches(range(clips), BATCH):
        frames = torch.zeros(len(batch), encoder.settings.num_mel_bins, 2 * positions)
        with torch.no_grad(), short_context(encoder.model, positions):
            encoder.model(input_features=frames)


def batches(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(found: dict[str, Any]) -> float:
    return found["seconds"]["features"] / found["seconds"]["bare"]


def table(found: dict[str, Any]) -> str:
    seconds, clips = found["seconds"], found["clips"]
    shown = [str(clips), f"{seconds['features']:.1f}", f"{seconds['bare']:.1f}", f"{ratio(found):.2f}"]
    row = [*shown, f"{clips / seconds['features']:.1f}", "ok" if ratio(found) <= LIMIT else f"above {LIMIT}"]
    note = (
        f"Clips of {SECONDS:g} s at {RATE} Hz in WAV files, through a Whisper encoder of {found['parameters'] / 1e6:.1f} M"
        f" random parameters in batches of {BATCH}, {found['cores']} cores. Limit: {LIMIT}. {sentence(found['made'])}"
    )
    return "\n".join([*markdown.table(COLUMNS, [row]), "", note, ""])


def check(found: dict[str, Any]) -> None:
    if ratio(found) > LIMIT:
        raise EncodeError(f"features take {ratio(found):.2f} of the bare passes' time, {LIMIT} are allowed")
