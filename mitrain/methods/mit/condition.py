"""What an adapter is told about the samples of a forward pass: one global feature vector per modality.

Shapes: B samples, e feature width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mitrain.core.config import nearest
from mitrain.core.errors import ModelError

Feature = Tensor | tuple[Tensor, Tensor] | None
"""One modality's features (B, e); or these with a (B,) bool mask of the samples that have it; or None: missing."""


@dataclass(frozen=True)
class Condition:
    """Checked features of the modalities that are there.

    where: ``features`` name -> (B, e); ``present`` name -> (B,) bool, only for modalities that some samples lack
    (whose rows in ``features`` are 0); ``copies``: consecutive rows of the batch that share a sample's features, such
    as the beams of a beam search; None takes as many as the batch asks for.
    """

    features: dict[str, Tensor]
    present: dict[str, Tensor]
    copies: int | None = 1
    memory: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def samples(self) -> int:
        return next(iter(self.features.values())).shape[0]

    def copies_for(self, batch: int) -> int:
        """How often each sample's features are repeated for a batch of ``batch`` rows; ModelError if they don't fit."""
        copies = self.copies
        if copies is None and batch % self.samples == 0:
            copies = batch // self.samples
        if copies is None or copies * self.samples != batch:
            times = "" if copies in (1, None) else f" × copies={copies}"
            raise ModelError(
                f"the features are those of {self.samples} samples{times}, but the batch has {batch} rows: give one "
                "row of features per sample, and copies=num_beams (or num_return_sequences) for generate"
            )
        return copies

    def for_batch(self, batch: int) -> "Condition":
        """With one row of features per row of the batch."""
        copies = self.copies_for(batch)
        if copies == 1:
            return self
        return self.rows(torch.arange(self.samples).repeat_interleave(copies))

    def rows(self, indices: Tensor) -> "Condition":
        """Only (or repeatedly) the samples ``indices``."""
        features, present = (
            {name: x[indices.to(x.device)] for name, x in group.items()} for group in (self.features, self.present)
        )
        return Condition(features, present)

    def same_features(self, other: "Condition") -> bool:
        """Whether both say the same of the same number of samples."""
        return all(
            mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())
            for mine, theirs in ((self.features, other.features), (self.present, other.present))
        )


def make_condition(
    features: Mapping[str, Feature] | None, widths: Mapping[str, int], copies: int | None = 1
) -> Condition | None:
    """Check ``features`` against the modalities' ``widths``; None when every modality is missing.

    Raises ModelError naming the modality that is unknown or has the wrong type, rank, width or number of samples.
    """
    if features is not None and not isinstance(features, Mapping):
        raise ModelError(f"features must be a mapping such as {{'image': tensor}}, not {type(features).__name__}")
    if copies is not None and (not isinstance(copies, int) or isinstance(copies, bool) or copies < 1):
        raise ModelError(f"copies={copies!r}: give the number of beams or returned sequences, at least 1")
    checked: dict[str, Tensor] = {}
    present: dict[str, Tensor] = {}
    for name, value in (features or {}).items():
        if name not in widths:
            raise ModelError(
                f"unknown modality {name!r}{nearest(str(name), widths)}: this adapter knows {', '.join(widths)}"
            )
        if value is None:
            continue
        tensor, mask = value if isinstance(value, tuple | list) and len(value) == 2 else (value, None)
        checked[name] = check_feature(name, tensor, widths[name])
        if mask is not None:
            feature = checked[name]
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != feature.shape[:1]:
                raise ModelError(
                    f"the presence mask of {name!r} must be a bool tensor of shape ({len(feature)},), True where it is there"
                )
            present[name] = mask.to(feature.device)
            checked[name] = checked[name].masked_fill(~present[name][:, None], 0)
    sizes = {name: len(x) for name, x in checked.items()}
    if len(set(sizes.values())) > 1:
        raise ModelError(f"the modalities have different numbers of samples {sizes}: give one row per sample to each")
    return Condition(checked, present, copies) if checked else None


def check_feature(name: str, tensor: object, width: int) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ModelError(f"features[{name!r}] is {kind}: give a floating-point tensor of shape (batch, {width})")
    if tensor.ndim != 2 or tensor.shape[1] != width or not len(tensor):
        raise ModelError(
            f"features[{name!r}] has shape {tuple(tensor.shape)}: give (batch, {width}), one global vector per sample, "
            f"or set modalities.{name} to the width of your encoder's features"
        )
    return tensor
