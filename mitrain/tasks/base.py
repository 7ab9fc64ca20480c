"""What the trainer and the evaluation ask of a task.

A task owns the trainable head (if it has one), turns samples and infused features into a loss as (sum, count), and
scores. It is handed the frozen language model, the adapter and the sources of frozen features; it never loads anything.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mitrain.core.errors import UserError
from mitrain.models.batch import Picture, Reading, Words


class TextModel(Protocol):
    """The part of `mitrain.models.TextBackbone` that tasks use."""

    model: Any
    tokenizer: Any
    width: int
    device: torch.device
    dtype: torch.dtype
    sharded: bool

    @property
    def pad_id(self) -> int: ...
    def probe(self, side: str = "right") -> tuple[Tensor, Tensor]: ...
    def tokens(
        self, text: str, *, frame: Sequence[str] = ..., most: int | None = None, strip: str | None = " "
    ) -> list[int]: ...
    def plain(self, text: str) -> list[int]: ...
    def prompt(self, text: str, frame: Sequence[str] = ...) -> list[int]: ...
    def answered(self, text: str, answer: str, frame: Sequence[str] = ...) -> tuple[list[int], int]: ...
    def pad(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]: ...
    def log_likelihood(
        self,
        ids: Tensor,
        mask: Tensor,
        rows: Tensor,
        positions: Tensor,
        targets: Tensor,
        states: Tensor | None = None,
        depth: int = 0,
    ) -> Tensor: ...
    def hidden(self, ids: Tensor, mask: Tensor, states: Tensor | None = None, depth: int = 0) -> Tensor: ...
    def embeddings(self, ids: Tensor) -> Tensor: ...


class States(Protocol):
    """The part of `mitrain.data.features.TextStates` that tasks use."""

    depth: int

    def batch(self, rows: Sequence[Sequence[int]]) -> Tensor | None: ...


class Reader(Protocol):
    """The part of `mitrain.methods.base.Adapter` that tasks use."""

    method: str
    places: tuple[str, ...]
    fuses: bool

    @property
    def feature_widths(self) -> Mapping[str, int]: ...
    def bind(self, features: Mapping[str, Any], copies: int = 1) -> AbstractContextManager: ...
    def modalities_of(self, feature: Tensor | None) -> Mapping[str, Any]: ...
    def read(self, words: Words | None, picture: Picture | None) -> Reading: ...
    def image_width(self, feature: int) -> int: ...
    @property
    def joint_width(self) -> int: ...


@dataclass(frozen=True)
class Parts:
    """The frozen model, the adapter on it, and the trunk's states."""

    text: TextModel
    adapter: Reader
    states: States


@dataclass(frozen=True)
class Batch:
    """Samples with their infused feature (B, e), and the patch tokens where the task has a decoder.

    ``images``: the same features (B, e) for a task's own use, there also where the infusion is left out. ``states``
    (B, N, c): what enters layer ``depth`` of the image encoder, where the method asks for it.
    """

    samples: Sequence[Any]
    features: Tensor | None
    levels: list[Tensor] = field(default_factory=list)
    images: Tensor | None = None
    states: Tensor | None = None
    depth: int = 0

    @property
    def picture(self) -> Picture | None:
        """The pictures as a method reads them."""
        feature = self.images if self.features is None else self.features
        return None if feature is None else Picture(feature, self.states, self.depth, self.features is not None)


@dataclass
class Prediction:
    """One sample's outcome: plain ``values``, and the mask or ``vector`` that a score is computed from.

    ``finite``: whether all numbers were that it was made of; an order of NaN is an order of nothing.
    """

    id: str
    image: str
    values: dict[str, Any]
    mask: Any = None
    vector: Any = None
    finite: bool = True


class Task(nn.Module):
    """Base of the tasks; its parameters are the task's trainable head.

    ``metric``: what the best step is chosen by. ``decodes``: reads patch tokens. ``speaks``: can generate text.
    ``shuffles``: what the control of that name exchanges (`evaluate`). ``columns``: title and metric of a table's
    columns; ``controls``: which controls it has rows for.
    """

    metric: str
    decodes: bool = False
    speaks: bool = False
    shuffles: Literal["samples", "images", "expressions"] = "samples"
    columns: tuple[tuple[str, str], ...] = ()
    controls: tuple[str, ...] = ("no-image", "frozen")

    def __init__(self, parts: Parts):
        super().__init__()
        object.__setattr__(self, "parts", parts)

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        """The rows of token ids whose trunk states will be needed."""
        raise NotImplementedError

    def tokens(self, samples: Sequence[Any]) -> int:
        """How many tokens of text a batch of ``samples`` holds."""
        raise NotImplementedError

    def fit(self, samples: Sequence[Any], see: "Callable[[Sequence[Any]], Batch] | None" = None) -> None:
        """Take statistics from the training samples before the first step; ``see`` makes a batch of some of them."""

    def remember(self, samples: Sequence[Any]) -> None:
        """Note what predictions need of the training samples and no checkpoint holds."""

    def must_generate(self, samples: Sequence[Any]) -> bool:
        """Whether some of ``samples`` can be scored only by letting the model speak."""
        return False

    def rehearse(self, samples: Sequence[Any]) -> None:
        """Say, or refuse, before the first step what could not be done with ``samples`` after it."""

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum, count) over the batch."""
        raise NotImplementedError

    def activation_bytes(self) -> int:
        """Bytes per sample that a backward pass needs of the task's own head and loss."""
        return 0

    def predict(self, batch: Batch) -> list[Prediction]:
        raise NotImplementedError

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The metrics of a split, ``metric`` and ``samples`` among them."""
        raise NotImplementedError

    def lines(self, sample: Any, prediction: Prediction) -> tuple[list[str], bool | None]:
        """What a figure says below a sample's picture, and whether it went right."""
        raise NotImplementedError


def require_finite(broken: Sequence[str], total: int, what: str = "the model") -> None:
    """UserError where samples, ``broken`` by their ids, were scored with numbers that are not finite."""
    if broken:
        raise UserError(
            f"{what}: {len(broken)} of {total} samples are scored with numbers that are not finite (the first is"
            f" {broken[0][:80]!r}): the weights are damaged or have diverged; take an earlier checkpoint, or lower train.lr"
        )
