"""What goes into the adapted backbones, and what comes out: a batch of texts, of other modalities, the outputs.

Shapes: B samples, T tokens, D width of the text model, N tokens of another encoder (of an image: prefix + patches), c width
of that encoder's layers, e width of a modality's feature, J width of a method's joint state.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

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
    ``changed``, for methods that change it or read its tokens. ``counts`` (B, 2) int64: how many states a sample's file has,
    which see one another, and how many of these, the first, are read out; the rest is padding (none: all of both).
    ``infused`` False: the inputs are there, but the language model is not to see them (a control).

    A sample that lacks the modality ``changed`` has states of zeros. They pass the encoder, so that nothing is divided by a
    count of 0, and whoever reads them gives them no weight (`lacking`).
    """

    features: Mapping[str, Tensor]
    present: Mapping[str, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    depth: int = 0
    changed: str = ""
    infused: bool = True
    counts: Tensor | None = None

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
        states, counts = (None if x is None else function(x) for x in (self.states, self.counts))
        return replace(self, features=features, present=present, states=states, counts=counts)

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
        if first.states is None:
            return replace(first, features=features, present=present)
        longest = max(part.states.shape[1] for part in parts)
        states = torch.cat([nn.functional.pad(p.states, (0, 0, 0, longest - p.states.shape[1])) for p in parts])
        known = any(part.counts is not None or part.states.shape[1] < longest for part in parts)
        counts = torch.cat([part.counted for part in parts]) if known else None
        return replace(first, features=features, present=present, states=states, counts=counts)

    @property
    def counted(self) -> Tensor:
        """`counts`, written out."""
        whole = torch.full((len(self), 2), self.states.shape[1], device=self.states.device)
        return whole if self.counts is None else self.counts

    @property
    def visible(self) -> Tensor | None:
        """(B, N) bool: which states are no padding; None: all."""
        return self._first(0)

    @property
    def shown(self) -> Tensor | None:
        """(B, N) bool: which states are read out; None: all."""
        return self._first(1)

    def _first(self, column: int) -> Tensor | None:
        if self.counts is None:
            return None
        return torch.arange(self.states.shape[1], device=self.counts.device) < self.counts[:, column, None]

    @property
    def lacking(self) -> Tensor | None:
        """(B,) bool: which samples lack the modality ``changed``; None: none of them."""
        return ~self.present[self.changed] if self.changed in self.present else None

    def has(self, name: str) -> Tensor:
        """(B,) bool: which samples have the modality ``name``."""
        there = self.present.get(name)
        return torch.ones(len(self), dtype=torch.bool, device=self.features[name].device) if there is None else there

    def with_vector(self, vector: Tensor) -> dict[str, Tensor]:
        """The features, that of the changed encoder replaced by the ``vector`` (B, w) that it gives now, 0 where a sample
        lacks its file."""
        lacking = self.lacking
        return {**self.features, self.changed: vector if lacking is None else vector.masked_fill(lacking[:, None], 0)}


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
    """Mean of (B, T, D) over the tokens that ``mask`` (B, T) admits, 0 where it admits none."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


def moments(states: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean, and 1 / std, over the rows of ``states``, both (width,) float64; 0 and 1 of no rows."""
    rows = torch.cat([part.double() for part in states])
    if not len(rows):
        return torch.zeros(rows.shape[1]), torch.ones(rows.shape[1])
    std = rows.std(0, correction=0)
    return rows.mean(0), torch.where(std > 1e-6, 1 / std.clamp_min(1e-3), 1.0)
