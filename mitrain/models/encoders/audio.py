"""Frozen encoders of sound: Whisper, wav2vec 2.0, HuBERT and WavLM, AST, CLAP's audio side.

Clips of one length run together, so that none is padded for another's sake: attention without a mask, and wav2vec 2.0's norm
over time, would let a feature depend on what else is in the batch. Whisper reads a clip's own length, rounded up, in place
of the 30 s that it was trained with: its position embeddings are cut, and padding is left out of the mean.

Shapes: B clips, n samples, T frames, D hidden width, e feature width.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    AutoModel,
    ClapAudioModelWithProjection,
    ClapFeatureExtractor,
    PretrainedConfig,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
)
from transformers.utils import is_speech_available

from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import frozen, loading
from mitrain.models.encoders.base import Encoder, Entering, Pool, cut_to_layer, load, over_time, top_layer
from mitrain.models.encoders.config import EncoderConfig

log = logging.getLogger(__name__)

FILES = ("preprocessor_config.json", "processor_config.json")
LONGEST = 30.0  # seconds, of encoders that take any length
STEP = 0.5
"""Seconds: Whisper reads clips whose length is a multiple, so that many have one."""


class AudioConfig(EncoderConfig):
    """One frozen encoder of sound."""

    takes: Literal["audio"] = "audio"
    seconds: float | None = Field(None, gt=0, le=600)
    pool: Pool = "auto"


class WhisperListener(WhisperForAudioClassification):
    """Whisper's encoder alone out of a whole checkpoint."""

    _keys_to_ignore_on_load_unexpected = (r"^(model\.)?decoder\.", r"^proj_out\.")


class ClapListener(ClapAudioModelWithProjection):
    """CLAP's audio side alone out of a whole checkpoint."""

    _keys_to_ignore_on_load_unexpected = (r"^text_", r"^logit_scale")


@dataclass(frozen=True)
class Family:
    """How models of one kind are read: their class, their feature extractor and what it would be of their configuration.

    ``part``: the module of the model that listens; its tensors' names begin so. ``pools``: it has a pooled vector.
    """

    factory: Any
    extractor: type
    usual: Callable[[PretrainedConfig], dict[str, Any]] = lambda settings: {}
    part: str = ""
    pools: bool = False


RAW = Family(AutoModel, Wav2Vec2FeatureExtractor)
CLAP = Family(
    ClapListener,
    ClapFeatureExtractor,
    lambda s: {"feature_size": s.num_mel_bins, "truncation": "fusion" if s.enable_fusion else "rand_trunc"},
    pools=True,
)
FAMILIES = {
    "whisper": Family(WhisperListener, WhisperFeatureExtractor, lambda s: {"feature_size": s.num_mel_bins}, "encoder"),
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm"), RAW),
    "audio-spectrogram-transformer": Family(
        AutoModel, ASTFeatureExtractor, lambda s: {"num_mel_bins": s.num_mel_bins, "max_length": s.max_length}, pools=True
    ),
    **dict.fromkeys(("clap", "clap_audio_model"), CLAP),
}


class AudioEncoder(Encoder):
    """See `Encoder`. ``rate``: samples a second that it listens to. ``longest``: samples of a clip that it reads."""

    def _make(self, settings: Any, source: str | Path, *where: Any) -> None:
        config = self.config
        if self.family not in FAMILIES:
            raise ConfigError(f"{config.label} is a {self.family} model: give one of {', '.join(FAMILIES)}")
        kind = FAMILIES[self.family]
        self.settings = getattr(settings, "audio_config", settings)
        self.depth = 0 if self.family.startswith("clap") else self.settings.num_hidden_layers
        self.extractor = extractor_of(config, source, kind, self.settings)
        if kind.pools and self.config.pool != "auto":
            raise ConfigError(f"{self.config.label} pools a spectrogram of one length itself: leave out pool")
        # neither what masks frames in training nor a head for another task
        used = lambda name: name.startswith(kind.part) and not name.endswith("masked_spec_embed")  # noqa: E731
        model = load(config, source, kind.factory, self.settings, used, *where)
        self.model = getattr(model, kind.part) if kind.part else model
        cut_to_layer(self.model, config, self.depth)
        self.rate = int(self.extractor.sampling_rate)
        self.longest = self._longest()
        self._told = False

    @property
    def pool(self) -> str:
        """What ``auto`` stands for here."""
        if self.config.pool != "auto":
            return self.config.pool
        return "own" if FAMILIES[self.family].pools else "mean"

    @property
    def width(self) -> int:
        wide = self.settings.projection_dim if self.family.startswith("clap") else self.settings.hidden_size
        return wide * (2 if self.pool == "mean+std" else 1)

    def _longest(self) -> int:
        """The most samples of a clip; ConfigError where ``seconds`` is more than the encoder can take."""
        most = {
            "whisper": getattr(self.settings, "max_source_positions", 0) * self._hop,
            "audio-spectrogram-transformer": getattr(self.settings, "max_length", 0) * self.rate // 100,
        }.get(self.family, getattr(self.extractor, "nb_max_samples", math.inf))
        wanted = math.inf if self.config.seconds is None else round(self.config.seconds * self.rate)
        if math.inf > wanted > most:
            raise ConfigError(
                f"{self.config.label} reads {most / self.rate:g} s at most, not seconds={self.config.seconds:g}"
            )
        return int(min(wanted, most, math.inf if self.config.seconds else LONGEST * self.rate))

    @property
    def _hop(self) -> int:
        """Samples of sound to a frame of Whisper's states: its second convolution takes every other frame."""
        return 2 * getattr(self.extractor, "hop_length", 160)

    @property
    def _shortest(self) -> int:
        """The fewest samples that make a frame."""
        if not hasattr(self.settings, "conv_kernel"):
            return 400  # a window of AST's filter bank
        samples = 1
        for kernel, stride in zip(self.settings.conv_kernel[::-1], self.settings.conv_stride[::-1], strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def preprocess(self, decoded: Any, view: int = 0) -> Tensor:
        """What the model takes of a clip (`mitrain.data.audio.Sound`), but for Whisper: its samples (n,). One shorter than a
        frame ends in silence."""
        samples = decoded.at(self.rate)
        if len(samples) > self.longest and not self._told:
            self._told = True
            log.warning(
                "%s reads the first %g s of clips: %s is longer, the first of them",
                self.config.label,
                self.longest / self.rate,
                decoded.where,
            )
        return self._prepared(samples[: self.longest])

    def blank(self) -> Tensor:
        return self._prepared(np.zeros(1, np.float32))

    def _prepared(self, samples: np.ndarray) -> Tensor:
        if not self.family.startswith("clap"):  # which repeats a short clip
            samples = np.pad(samples, (0, max(0, self._shortest - len(samples))))
        if self.family == "whisper":
            return torch.from_numpy(np.ascontiguousarray(samples))
        made = self.extractor(samples, sampling_rate=self.rate, return_tensors="np")
        return torch.from_numpy(np.asarray(made[self.extractor.model_input_names[0]][0], np.float32))

    def _size(self, item: Tensor) -> Any:
        return self._positions(len(item)) if self.family == "whisper" else super()._size(item)

    def _positions(self, samples: int) -> int:
        """How many of Whisper's positions a clip takes."""
        rounded = math.ceil(samples / (STEP * self.rate)) * STEP * self.rate
        return min(math.ceil(rounded / self._hop), self.settings.max_source_positions)

    def _pooled(self, items: Sequence[Tensor]) -> Tensor:
        if self.family == "whisper":
            return self._whispered(items)
        batch = self._batch(items)
        if self.family.startswith("clap"):
            # The feature extractor would call one of a batch longer than it is, at random.
            longer = torch.zeros(len(items), 1, dtype=torch.bool, device=batch.device)
            return self.model(input_features=batch, is_longer=longer).audio_embeds
        output, states = self._run(input_values=batch)
        if self.pool != "own":
            return over_time(states, [states.shape[1]] * len(items), self.pool)
        return output.pooler_output if self.config.layer is None else states[:, :2].mean(1)  # AST's two class tokens

    @property
    def enters(self) -> bool:
        return not self.family.startswith("clap")

    def _entering(self, depth: int, items: Sequence[Tensor]) -> Sequence[Entering]:
        if self.family != "whisper":
            states = frozen.trunk_states(self.model, depth, input_values=self._batch(items))
            return [(row, len(row)) for row in states]
        with self._features(items) as features:
            states = frozen.trunk_states(self.model, depth, input_features=features)
        return [(row, self._frames(item)) for row, item in zip(states, items, strict=True)]

    @property
    def tokens(self) -> int:
        """The most states of a clip."""
        if self.family == "whisper":
            return self._positions(self.longest)
        if not hasattr(self.settings, "conv_kernel"):
            return self.model.embeddings.position_embeddings.shape[1]
        kernels = zip(self.settings.conv_kernel, self.settings.conv_stride, strict=True)
        return reduce(lambda samples, step: (samples - step[0]) // step[1] + 1, kernels, self.longest)

    def _frames(self, item: Tensor) -> int:
        """How many of Whisper's states are of a clip, not of the silence behind it."""
        return math.ceil(len(item) / self._hop)

    @contextmanager
    def _features(self, items: Sequence[Tensor]) -> Iterator[Tensor]:
        """Whisper's features of clips of one `_size`; inside, its encoder takes as many."""
        positions, weight = self._positions(len(items[0])), next(self.model.parameters())
        made = self.extractor(
            [item.numpy() for item in items],
            sampling_rate=self.rate,
            max_length=positions * self._hop,
            return_tensors="pt",
            device=str(weight.device),
        )
        with short_context(self.model, positions):
            yield made["input_features"].to(weight.device, weight.dtype)

    def _whispered(self, items: Sequence[Tensor]) -> Tensor:
        with self._features(items) as features:
            _, states = self._run(input_features=features)
        return over_time(states, [self._frames(item) for item in items], self.pool)

    def _run(self, **inputs: Tensor) -> tuple[Any, Tensor]:
        """The model's output, and the states (B, T, D) that are read."""
        if self.config.layer is None:
            output = self.model(**inputs)
            return output, output.last_hidden_state
        with top_layer(self.model) as seen:
            return self.model(**inputs), seen[-1]

    def _preprocessing(self) -> Any:
        """The feature extractor's settings with what is done around them; AST's differ where torchaudio is installed."""
        by = {"torchaudio": is_speech_available()} if isinstance(self.extractor, ASTFeatureExtractor) else {}
        said = {k: v for k, v in self.extractor.to_dict().items() if not isinstance(v, np.ndarray | list)}
        return {"extractor": said, "longest": self.longest, "step": STEP, **by}


def extractor_of(config: AudioConfig, source: str | Path, kind: Family, settings: PretrainedConfig) -> Any:
    """The feature extractor as it was saved, else as its class makes it for the model's sizes, which is said."""
    if not config.shape and any(loading.find(source, name) for name in FILES):
        extractor = loading.load(AutoFeatureExtractor, source, "feature extractor")
        if not isinstance(extractor, kind.extractor):
            raise ModelError(
                f"{config.label} has a {type(extractor).__name__} beside it, not a {kind.extractor.__name__}: give the"
                " preprocessor_config.json that belongs to it"
            )
    else:
        extractor = kind.extractor(**kind.usual(settings))
        if not config.shape:
            log.warning(
                "%s has no preprocessor_config.json: sound is prepared as by a new %s, %d samples a second; put the file"
                " there if it was trained otherwise",
                config.label,
                kind.extractor.__name__,
                extractor.sampling_rate,
            )
    for name, wanted in kind.usual(settings).items():
        if (given := getattr(extractor, name)) != wanted:
            raise ModelError(f"{config.label} needs {name}={wanted} of its feature extractor, whose file says {given}")
    extractor.dither = 0.0  # noise that would make a feature differ from one time to the next
    return extractor


@contextmanager
def short_context(model: nn.Module, positions: int) -> Iterator[None]:
    """Inside, Whisper's encoder reads ``positions`` frames, not all that it has position embeddings for."""
    table, settings = model.embed_positions, model.config
    whole = table.num_embeddings, settings.max_source_positions
    # Both are what the model asks; the weights stay as they are, which may lie in shards.
    table.num_embeddings = settings.max_source_positions = positions
    try:
        yield
    finally:
        table.num_embeddings, settings.max_source_positions = whole
