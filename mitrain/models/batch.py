"""What goes into the adapted backbones, and what comes out: a batch of texts, the inputs of its other modality, the outputs.

Shapes: B samples, T tokens, D width of the text model, N picture tokens (prefix + patches), c width of the image
encoder's layers, e width of the picture's global feature, J width of a method's joint state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STATES = ("last", "mean", "cls")
"""Read-outs of the text model's final states."""


@dataclass(frozen=True)
class TextBatch:
    """A batch of texts: ``ids`` and ``mask`` (B, T), right-padded.

    ``states`` (B, T, D): what enters layer ``depth`` of the frozen text model; None: run it from its bottom.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor | None = None
    depth: int = 0


@dataclass(frozen=True)
class ModalityInputs:
    """A batch of pictures as the frozen encoders see them.

    ``feature`` (B, e): the normalised global feature. ``states`` (B, N, c): what enters layer ``depth`` of the image
    encoder, for methods that change it or read its tokens. ``infused`` False: the feature is there, but the language
    model is not to see it (a control).
    """

    feature: Tensor
    states: Tensor | None = None
    depth: int = 0
    infused: bool = True

    def __len__(self) -> int:
        return len(self.feature)

    def rows(self, index: Tensor | slice) -> "ModalityInputs":
        """Only (or repeatedly) the pictures ``index``."""
        states = None if self.states is None else self.states[index]
        return ModalityInputs(self.feature[index], states, self.depth, self.infused)

    def to(self, device: torch.device) -> "ModalityInputs":
        states = None if self.states is None else self.states.to(device)
        return ModalityInputs(self.feature.to(device), states, self.depth, self.infused)

    @staticmethod
    def joined(parts: Sequence["ModalityInputs"]) -> "ModalityInputs":
        """Several batches as one."""
        first = parts[0]
        states = None if first.states is None else torch.cat([part.states for part in parts])
        return ModalityInputs(torch.cat([part.feature for part in parts]), states, first.depth, first.infused)


@dataclass(frozen=True)
class Outputs:
    """What the adapted backbones make of a batch; a part is None where nothing was asked or the method has none.

    ``text`` (B, T, D): the text model's final states, with ``mask`` (B, T). ``image``: (B, e) the picture's vector.
    ``joint``: (B, J) what the method itself predicts from.
    """

    text: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None
    joint: Tensor | None = None

    def read_out(self, name: str) -> Tensor:
        """(B, width) float32: ``last`` token's final state, their ``mean``, the first (``cls``), ``image`` or ``joint``."""
        if name in ("image", "joint"):
            return getattr(self, name).float()
        hidden = self.text.float()
        if name == "cls":
            return hidden[:, 0]
        if name == "mean":
            return mean_over(hidden, self.mask)
        return hidden[torch.arange(len(hidden), device=hidden.device), self.mask.sum(1) - 1]


def mean_over(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T, D) over the tokens that ``mask`` (B, T) admits."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1)
