"""What goes into the adapted backbones, and what comes out: a batch of texts, of other modalities, the outputs.

Shapes: B samples, T tokens, D width of the text model, N tokens of another encoder (of an image: prefix + patches), c width
of that encoder's layers, e width of a modality's feature, J width of a method's joint state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """The modalities beside the text of a batch of samples, as the frozen encoders see them.

    ``features``: modality -> (B, e) normalised; a row of zeros where a sample lacks it. ``present``: modality -> (B,) bool,
    only of those that some samples lack. ``states`` (B, N, c): what enters layer ``depth`` of the encoder of the modality
    ``changed``, for methods that change it or read its tokens. ``infused`` False: the inputs are there, but the language
    model is not to see them (a control).
    """

    features: Mapping[str, Tensor]
    present: Mapping[str, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    depth: int = 0
    changed: str = ""
    infused: bool = True

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.features.values())).device

    @property
    def feature(self) -> Tensor:
        """(B, sum of e): all features side by side."""
        parts = list(self.features.values())
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "ModalityInputs":
        features, present = ({name: function(x) for name, x in part.items()} for part in (self.features, self.present))
        return replace(
            self, features=features, present=present, states=None if self.states is None else function(self.states)
        )

    def rows(self, index: Tensor | slice) -> "ModalityInputs":
        """Only (or repeatedly) the samples ``index``."""
        return self._map(lambda x: x[index])

    def to(self, device: torch.device) -> "ModalityInputs":
        return self._map(lambda x: x.to(device))

    @staticmethod
    def joined(parts: Sequence["ModalityInputs"]) -> "ModalityInputs":
        """Several batches as one."""
        first = parts[0]
        features = {name: torch.cat([part.features[name] for part in parts]) for name in first.features}
        lacked = dict.fromkeys(name for part in parts for name in part.present)
        present = {name: torch.cat([part.has(name) for part in parts]) for name in lacked}
        states = None if first.states is None else torch.cat([part.states for part in parts])
        return replace(first, features=features, present=present, states=states)

    def has(self, name: str) -> Tensor:
        """(B,) bool: which samples have the modality ``name``."""
        there = self.present.get(name)
        return torch.ones(len(self), dtype=torch.bool, device=self.features[name].device) if there is None else there

    def with_vector(self, vector: Tensor) -> dict[str, Tensor]:
        """The features, that of the changed encoder replaced by the ``vector`` (B, w) that it gives now."""
        return {**self.features, self.changed: vector}


@dataclass(frozen=True)
class Outputs:
    """What the adapted backbones make of a batch; a part is None where nothing was asked or the method has none.

    ``text`` (B, T, D): the text model's final states, with ``mask`` (B, T). ``vectors``: of each modality (B, e or the
    changed encoder's width). ``joint``: (B, J) what the method itself predicts from.
    """

    text: Tensor | None = None
    mask: Tensor | None = None
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    joint: Tensor | None = None

    def read_out(self, name: str) -> Tensor:
        """(B, width) float32: ``last`` token's final state, their ``mean``, the first (``cls``), ``joint``, or the vector of
        the modality ``name``."""
        if name in self.vectors:
            return self.vectors[name].float()
        if name == "joint":
            return self.joint.float()
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
