"""What the frozen encoders say of the samples' inputs: one feature of each modality, and what else is asked for.

A sample's ``inputs`` map the names of its files to their paths below the data's folder; one that has none lacks that
modality. Shapes: B samples, e width of a modality's feature, E width of all of them side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mitrain.core import parsing
from mitrain.core.config import Section
from mitrain.core.errors import ConfigError
from mitrain.core.files import write_json
from mitrain.core.provenance import digest
from mitrain.data.columns import paths, take
from mitrain.data.encoded import ENCODE_BATCH, EncoderFeatures, Encoding, InputFeatures, Progress, no_progress
from mitrain.data.media import Limits, medium_of
from mitrain.data.samples import BadSamples, Sample
from mitrain.models import Encoder
from mitrain.models.encoders.image import VIEWS

Inputs = Mapping[str, str]
Moments = tuple[Tensor, Tensor]
AT_ONCE = 1 << 16  # files whose features are in memory at a time for their statistics


class FeatureConfig(Section):
    """How a modality's feature is made from its encoders' output. Only image and video encoders have ``views``."""

    normalize: Literal["standardize", "l2", "none"] = "standardize"
    norm: float = Field(4.0, gt=0)
    views: int = Field(1, ge=1, le=VIEWS)
    eval_views: int = Field(1, ge=1, le=VIEWS)
    noise: float = Field(0.0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class FeatureNorm(nn.Module):
    """Features (B, E) of all modalities side by side → the same, normalised, each modality by itself.

    Its statistics are buffers: an adapter carries them with it. ``widths``: e of each modality, in order.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, widths: Mapping[str, int], config: FeatureConfig):
        super().__init__()
        self.config, self.widths = config, dict(widths)
        self.register_buffer("mean", torch.zeros(sum(widths.values())))
        self.register_buffer("scale", torch.ones(sum(widths.values())))

    def split(self, features: Tensor) -> dict[str, Tensor]:
        """(B, E) → modality → (B, e)."""
        return dict(zip(self.widths, features.split(list(self.widths.values()), -1), strict=True))

    @property
    def standardizes(self) -> bool:
        return self.config.normalize == "standardize"

    def fit(self, moments: Mapping[str, Moments]) -> None:
        """Take mean and standard deviation (e,) of each modality's features."""
        if not self.standardizes:
            return
        means, scales = self.split(self.mean), self.split(self.scale)
        for name, (mean, std) in moments.items():
            means[name].copy_(mean)
            scales[name].copy_(self.config.norm / len(mean) ** 0.5 / std.clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        if self.config.normalize == "l2":
            parts = self.split(features).values()
            return torch.cat([nn.functional.normalize(part, dim=-1) * self.config.norm for part in parts], -1)
        return (features - self.mean) * self.scale

    def disturb(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Training noise on normalised features (B, E)."""
        if self.config.noise:
            unit = torch.cat([torch.full((e,), self.config.norm / e**0.5) for e in self.widths.values()]).to(features)
            noise = torch.randn(features.shape, generator=generator).to(features)
            features = features + self.config.noise * unit * noise
        if self.config.dropout:
            keep = torch.rand(features.shape, generator=generator).to(features) >= self.config.dropout
            features = features * keep / (1 - self.config.dropout)
        return features


@dataclass(frozen=True)
class Part:
    """One encoder's share of a modality: whose files it encodes, and to what."""

    modality: str
    input: str
    files: InputFeatures
    encoding: EncoderFeatures


class Features:
    """The frozen encoders' view of samples whose files lie under ``root``.

    ``encoders`` and ``modalities`` as in `mitrain.models.ModelConfig`; ``disabled`` takes off what changes an encoder
    meanwhile; ``also``: what else is made of the first encoder's files while they are read (`EncoderStates`).
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        modalities: Mapping[str, Sequence[str]],
        root: Path,
        cache: Path | None,
        limits: Limits,
        bad: Any = None,
        disabled: Callable[[], AbstractContextManager[Any]] = nullcontext,
        also: Encoding | None = None,
    ):
        self.bad: BadSamples | None = bad
        self.cache = cache
        made = {name: EncoderFeatures(encoder, cache, disabled) for name, encoder in encoders.items()}
        groups: dict[tuple[str, str], list[str]] = {}
        media = {name: medium_of(encoder) for name, encoder in encoders.items()}
        for name, encoder in encoders.items():
            groups.setdefault((encoder.config.input, media[name].name), []).append(name)
        self.also, self.first = also, next(iter(encoders), "")
        self.groups: list[tuple[str, InputFeatures]] = []
        files: dict[str, InputFeatures] = {}
        for (source, _), names in groups.items():
            encodings: list[Encoding] = [made[name] for name in names]
            if also is not None and self.first in names:
                encodings.append(also)
            group = InputFeatures(media[names[0]], encodings, root, cache, limits, bad)
            self.groups.append((source, group))
            files |= dict.fromkeys(names, group)
        self.parts = [
            Part(modality, encoders[name].config.input, files[name], made[name])
            for modality, names in modalities.items()
            for name in names
        ]
        self.seeing = [
            Part(name, encoder.config.input, files[name], made[name])
            for name, encoder in encoders.items()
            if getattr(encoder.config, "levels", ())
        ]
        self.widths: dict[str, int] = {}
        for part in self.parts:
            self.widths[part.modality] = self.widths.get(part.modality, 0) + part.encoding.encoder.width

    # which samples can be used

    def contents(self, sample: Any) -> dict[str, str | None]:
        """The digest of each of a sample's files, by input; None for one that cannot be read."""
        return {source: group.key(sample.inputs[source]) for source, group in self.groups if source in sample.inputs}

    def content(self, inputs: Inputs, name: str) -> Any:
        """The file of the input ``name``, decoded, as its first encoder reads it; DataError where it was replaced since."""
        return next(group for source, group in self.groups if source == name).content(inputs[name])

    def readable_in_block(self, samples: Sequence[Any]) -> list[Any]:
        """`readable`, each file looked at by one of the ranks; what was known of others is forgotten."""
        for source, group in self.groups:
            group.forget()
            group.look_together([sample.inputs[source] for sample in samples if source in sample.inputs])
        return self.readable(samples)

    def work(self, samples: Sequence[Any], views: int) -> int:
        """How many encodings `readable` makes of ``samples`` where nothing is kept."""
        return sum(
            len(files_of(samples, source)) * group.views(views) * len(group.encodings) for source, group in self.groups
        )

    def readable(self, samples: Sequence[Any], views: int = 0, progress: Progress = no_progress) -> Sequence[Any]:
        """The samples whose files can be read and fit their annotations; the budget counts and names the others.

        ``views``: so many of each file are encoded at once, while it is read.
        """
        usable = [True] * len(samples)
        sized = bool(samples) and hasattr(samples[0], "size")
        for source, group in self.groups:
            files = list(paths(samples, source))
            own = [i for i, file in enumerate(files) if file is not None]
            files = [files[i] for i in own]
            if sized and source == "image":  # what annotations state the size of
                group.expect({file: samples[i].size for i, file in zip(own, files, strict=True) if samples[i].size})
            if views:
                group.prepare(sorted(set(files)), views, progress)
            for i, able in zip(own, group.usable(files), strict=True):
                usable[i] &= able
        if samples and type(samples[0]).fault is not Sample.fault:
            for i, sample in enumerate(samples):
                if (fault := sample.fault()) and self.bad is not None:
                    self.bad.skip(sample.id, fault)
                    usable[i] = False
        kept = samples[:] if all(usable) else take(samples, [i for i, able in enumerate(usable) if able])
        if self.bad is not None:
            self.bad.check_share(len(samples) - len(kept), len(samples))
        for _, group in self.groups:
            group.say_notes()
        return kept

    # what is made of them

    def pooled(self, inputs: Sequence[Inputs], views: Sequence[int] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, E) float32: all features side by side, 0 where a sample lacks the modality; and of each modality that some
        lack, which samples have it, (B,) bool."""
        views = views or [0] * len(inputs)
        columns = [torch.zeros(len(inputs), 0), *(self._column(part, inputs, views) for part in self.parts)]
        there = {part.modality: torch.tensor([part.input in given for given in inputs]) for part in self.parts}
        return torch.cat(columns, 1), {name: mask for name, mask in there.items() if not mask.all()}

    def _column(self, part: Part, inputs: Sequence[Inputs], views: Sequence[int]) -> Tensor:
        """(B, e) of one encoder."""
        own = [i for i, given in enumerate(inputs) if part.input in given]
        if not own:
            return torch.zeros(len(inputs), part.encoding.encoder.width)
        values = part.files.pooled(part.encoding, [inputs[i][part.input] for i in own], [views[i] for i in own])
        if len(own) == len(inputs):
            return values
        column = torch.zeros(len(inputs), part.encoding.encoder.width)
        column[own] = values
        return column

    def averaged(self, inputs: Sequence[Inputs], views: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`pooled`, the mean over the first ``views`` variants."""
        rows = [self.pooled(inputs, [view] * len(inputs)) for view in range(views)]
        return torch.stack([features for features, _ in rows]).mean(0), rows[0][1]

    def moments(self, samples: Sequence[Any]) -> dict[str, Moments]:
        """Modality -> mean and standard deviation (e,) float64 over the different files of ``samples``.

        They are kept in the cache under the files' contents: a start on the same files reads none of their features.
        """
        found = {}
        for modality in self.widths:
            parts = [part for part in self.parts if part.modality == modality]
            files = [sorted(files_of(samples, part.input)) for part in parts]
            if files[0]:
                found[modality] = self._kept_moments(parts, files)
        return found

    def _kept_moments(self, parts: Sequence[Part], files: Sequence[Sequence[str]]) -> Moments:
        """`moments` of one modality, of the ``files`` of each of its ``parts``."""
        compute = partial(self._moments, parts, files)
        if self.cache is None:
            return compute()
        stores = [part.encoding.store.folder.name for part in parts]
        contents = [digest(map(part.files.key, own)) for part, own in zip(parts, files, strict=True)]
        path = self.cache / "statistics" / f"{digest([*stores, *contents]).rpartition(':')[2]}.json"
        with suppress(OSError, parsing.Unreadable, KeyError, TypeError, ValueError):
            held = parsing.read_json(path)
            if held["digest"] == digest([held["mean"], held["std"]]):
                return torch.tensor(held["mean"], dtype=torch.float64), torch.tensor(held["std"], dtype=torch.float64)
        mean, std = compute()
        values = {"mean": mean.tolist(), "std": std.tolist()}
        with suppress(OSError):  # they are computed again
            write_json(path, {**values, "digest": digest(values.values())})
        return mean, std

    def _moments(self, parts: Sequence[Part], files: Sequence[Sequence[str]]) -> Moments:
        if len(files[0]) <= AT_ONCE:
            values = torch.cat([self._of_part(part, own) for part, own in zip(parts, files, strict=True)], 1).double()
            return values.mean(0), values.std(0, correction=0)
        each = []
        for part, own in zip(parts, files, strict=True):
            sums = torch.zeros(3, part.encoding.encoder.width, dtype=torch.float64)
            first = self._of_part(part, own[:1]).double()  # about which squares are summed, so that none is much larger
            for start in range(0, len(own), AT_ONCE):
                values = self._of_part(part, own[start : start + AT_ONCE]).double() - first
                sums += torch.stack([values.sum(0), values.square().sum(0), torch.full_like(sums[0], len(values))])
            mean = sums[0] / sums[2]
            each.append((first[0] + mean, (sums[1] / sums[2] - mean.square()).clamp_min(0).sqrt()))
        means, stds = zip(*each, strict=True)
        return torch.cat(means), torch.cat(stds)

    def _of_part(self, part: Part, files: Sequence[str]) -> Tensor:
        """(files, e) of one encoder; a few are encoded at a time where nothing is kept."""
        starts = range(0, len(files), ENCODE_BATCH)
        chunks = [files[start : start + ENCODE_BATCH] for start in starts]
        return torch.cat([part.files.pooled(part.encoding, chunk, [0] * len(chunk)) for chunk in chunks])

    def levels(self, inputs: Sequence[Inputs]) -> list[Tensor]:
        """The tokens of every level of the encoders that have levels: a list of (B, prefix + N, c) float32."""
        tokens: list[Tensor] = []
        for part in self.seeing:
            if not all(part.input in given for given in inputs):
                raise ConfigError(f"masks are decoded from the input {part.input!r}: no sample can go without it")
            tokens += part.files.levels(part.encoding, [given[part.input] for given in inputs])
        return tokens

    def states(self, inputs: Sequence[Inputs], views: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """What enters the changed layers of the first encoder: (B, N, c) float32, padded with zeros, which a sample has
        alone that lacks its file; and `ModalityInputs.counts` where they differ."""
        part = next(part for part in self.parts if part.encoding.encoder is self.also.encoder)
        views = views or [0] * len(inputs)
        own = [i for i, given in enumerate(inputs) if part.input in given]
        made = part.files.states(self.also, [inputs[i][part.input] for i in own], [views[i] for i in own])
        longest = max([len(row) for row, _ in made], default=1)
        states = torch.zeros(len(inputs), longest, self.also.width)
        counts = torch.full((len(inputs), 2), longest)
        for i, (row, shown) in zip(own, made, strict=True):
            states[i, : len(row)], counts[i, 0], counts[i, 1] = row, len(row), shown
        return states, None if (counts == longest).all() else counts


def files_of(samples: Sequence[Any], source: str) -> set[str]:
    return {*paths(samples, source)} - {None}
