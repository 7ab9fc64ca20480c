"""Inputs of one modality, pictures, as tests make them by hand and read them from files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mitrain.data.features import Features
from mitrain.data.media import Limits
from mitrain.data.samples import BadSamples
from mitrain.models import ImageEncoder
from mitrain.models.batch import ModalityInputs, Outputs


def pictures(feature: Tensor, states: Tensor | None = None, depth: int = 0, infused: bool = True) -> ModalityInputs:
    """Samples with a picture each: its feature (B, e), and what enters layer ``depth`` of its encoder (B, N, c)."""
    return ModalityInputs({"image": feature}, {}, states, depth, "image", infused)


class Pictures:
    """`Features` of samples with one picture each, asked by the pictures' paths."""

    def __init__(
        self,
        encoders: Sequence[ImageEncoder],
        root: Path,
        cache: Path | None,
        pixels: int = 10**6,
        bad: BadSamples | None = None,
        also: Any = None,
    ):
        named = {f"image{n or ''}": encoder for n, encoder in enumerate(encoders)}
        for encoder in encoders:  # all of them read the input of the first
            encoder.config = encoder.config.model_copy(update={"input": "image"})
        self.all = Features(named, {"image": list(named)}, root, cache, Limits(pixels), bad, also=also)
        self.group = self.all.groups[0][1]
        self.features = [part.encoding for part in self.all.parts]
        self.width = sum(self.all.widths.values())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def readable(self, samples: Sequence[Any], views: int = 0) -> list[Any]:
        return self.all.readable(samples, views)

    def pooled(self, images: Sequence[str], views: Sequence[int] | None = None) -> Tensor:
        return self.all.pooled([{"image": image} for image in images], views)[0]

    def averaged(self, images: Sequence[str], views: int) -> Tensor:
        return self.all.averaged([{"image": image} for image in images], views)[0]

    def levels(self, images: Sequence[str]) -> list[Tensor]:
        return self.all.levels([{"image": image} for image in images])

    def states(self, images: Sequence[str], views: Sequence[int] | None = None) -> Tensor:
        return self.all.states([{"image": image} for image in images], views)[0]


def part_of(outputs: Outputs, name: str) -> Tensor:
    """What a method makes of the ``text``, of the ``image``, or of both (``joint``)."""
    return outputs.vectors[name] if name == "image" else getattr(outputs, name)
