"""What training, evaluation, prediction and inspection ask of a task.

A task is one file: its settings, the file formats whose samples it takes, its trainable head (if it has one), its loss as
(sum, count), its metrics, the baselines that its scores are read beside, its prediction for one sample, and how its data
and predictions are described and drawn. It is handed the frozen models and the adapter; it never loads anything.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from torch import Tensor, nn

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, DataError, UserError
from mitrain.data.figures import Panel
from mitrain.data.formats.labels import look_alikes
from mitrain.data.hidden_states import TextStates
from mitrain.data.sources import DataSection
from mitrain.methods.base import Adapter
from mitrain.models import Encoder, TextBackbone
from mitrain.models.batch import ModalityInputs

ALIKE = 5  # pairs that `caution` names


@dataclass(frozen=True)
class Parts:
    """The frozen model, the adapter on it, and the trunk's states."""

    text: TextBackbone
    adapter: Adapter
    states: TextStates


@dataclass(frozen=True)
class Given:
    """What a task is built from besides its settings.

    ``data``: the section that describes the samples, whose folder ``root()`` gives; ``encoders``: the frozen encoders;
    ``widths``: e of each modality; ``batch``: samples of a training step, over all ranks.
    """

    parts: Parts
    data: DataSection
    root: Callable[[], Path]
    encoders: Sequence[Encoder]
    widths: Mapping[str, int]
    batch: int


@dataclass(frozen=True)
class Batch:
    """Samples, their modalities' ``inputs`` to the method, and the tokens of each of the encoders' ``levels`` where the task
    has a decoder."""

    samples: Sequence[Any]
    inputs: ModalityInputs | None
    levels: list[Tensor] = field(default_factory=list)


@dataclass
class Prediction:
    """One sample's outcome: plain ``values``, and the mask or ``vector`` that a score is computed from.

    ``finite``: whether all numbers were that it was made of; an order of NaN is an order of nothing.
    """

    id: str
    inputs: Mapping[str, str]
    values: dict[str, Any]
    mask: Any = None
    vector: Any = None
    finite: bool = True


@dataclass(frozen=True)
class Question:
    """Files and a text about them. ``candidates``: what the user lets the model choose from, if anything. ``turns``: of a
    conversation its questions and answers up to the text, which has them as lines; else nothing.

    ``id``, ``inputs``: of the sample that they make; ``files``: what the user calls them. ``see(sample)``: the batch of one
    sample with them; ``decoded(name)``: the file of an input, decoded; ``what`` names the run in messages.
    """

    id: str
    inputs: Mapping[str, str]
    files: Mapping[str, str]
    text: str
    candidates: Sequence[str]
    see: Callable[[Any], "Batch"]
    decoded: Callable[[str], Any]
    what: str
    turns: tuple[str, ...] = ()

    def predicted(self, predictions: Sequence["Prediction"]) -> "Prediction":
        """The prediction; UserError where it was made of what is no number."""
        require_finite([p.id for p in predictions if not p.finite], 1, self.what)
        return predictions[0]


@dataclass(frozen=True)
class Answer:
    """A prediction for one sample, as JSON values and as lines to print; ``mask``: (H, W) bool, of `segment`."""

    values: dict[str, Any]
    lines: list[str]
    mask: np.ndarray | None = None


@dataclass
class Splits:
    """What baselines are made of: the samples ``chosen`` from a split, and more of the data where they ask for it.

    ``learn()``: the samples that training saw and those of val, whose features are at hand; ``complete()``: all of the
    split's samples on the files of those chosen;
    ``features(samples)``: (n, e), what is infused.
    """

    chosen: list[Any]
    learn: Callable[[], tuple[list[Any], list[Any]]]
    complete: Callable[[], list[Any]]
    features: Callable[[Sequence[Any]], Tensor]
    seed: int

    @cached_property
    def parts(self) -> tuple[list[Any], list[Any], list[Any]]:
        """The samples of training, of val, and those chosen."""
        return (*self.learn(), self.chosen)


class Task(nn.Module):
    """Base of the tasks; its parameters are the task's trainable head.

    ``settings``: its section of the configuration. ``formats``: the data sections whose samples it takes. ``metric``: what
    the best step is chosen by, the highest or, where the task ``minimises`` it, the lowest. ``decodes``: reads patch tokens
    and predicts masks. ``speaks``: can generate text. ``remembers``: predicts from the answers that training gave
    (`remember`). ``reads_no_text``: a sample may have none. ``takes_candidates``: chooses among those that a question gives;
    ``searches``: finds matches among them, or among the data's. ``shuffles``: what the negative control of that name
    exchanges (`evaluate`). ``columns``: title and metric of a table's columns; ``controls``: which negative controls it has
    rows for.
    ``keeps``: the input that ``shuffle`` leaves to its sample, of a task between two inputs. ``texts_apart``: the samples'
    field of which two splits had better share nothing. ``asks``: their field that holds a question's text; ``asking``:
    what else `predict` is told where there is no truth.
    ``of_samples``: how the names begin of buffers that describe the training samples, and that a head taken from another
    run therefore does not bring along. ``own_metric``: the import path of a score of the user's own. ``truth``: the
    samples' fields that `permuted` exchanges.
    """

    settings: ClassVar[type[Section]]
    formats: ClassVar[tuple[type[DataSection], ...]]
    metric: str
    minimises: bool = False
    decodes: bool = False
    speaks: bool = False
    remembers: bool = False
    reads_no_text: bool = False
    takes_candidates: bool = False
    searches: bool = False
    shuffles: Literal["samples", "files", "expressions"] = "samples"
    columns: tuple[tuple[str, str], ...] = ()
    controls: tuple[str, ...] = ("other-inputs", "frozen")
    texts_apart: str = ""
    keeps: str = ""
    asks: ClassVar[str] = "text"
    asking: ClassVar[Mapping[str, Any]] = {}
    of_samples: tuple[str, ...] = ()
    own_metric: str | None = None
    truth: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, config: Any, given: Given) -> "Task":
        """The task with the settings ``config``. ConfigError where they, the models and the data do not go together."""
        return cls(config, given.parts)

    @staticmethod
    def describe(samples: Sequence[Any]) -> dict[str, Any]:
        """Of what kind a split's samples are, for ``data inspect``."""
        raise NotImplementedError

    @staticmethod
    def caption(sample: Any) -> str:
        """A sample in a line of text."""
        raise NotImplementedError

    @staticmethod
    def caution(samples: Sequence[Any], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
        """One line for each thing that decides a part of the score whatever a model says; see `cautions`."""
        raise NotImplementedError

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

    def permuted(self, samples: Sequence[Any], seed: int) -> list[Any]:
        """The samples, each with another one's truth, so that what is learned of them is chance. ConfigError where all
        have the same."""
        truths = [{name: getattr(sample, name) for name in self.truth} for sample in samples]
        if not self.truth or all(truth == truths[0] for truth in truths):
            raise ConfigError(
                "train.permute exchanges labels, answers, texts or targets, of which these samples have none that differ"
            )
        order = np.random.default_rng(seed).permutation(len(samples))
        return [replace(sample, **truths[i]) for sample, i in zip(samples, order, strict=True)]

    def bytes_to_fit(self, samples: int) -> int:
        """What `fit` holds beside the model for so many training samples, where that is much."""
        return 0

    def must_generate(self, samples: Sequence[Any]) -> bool:
        """Whether some of ``samples`` can be scored only by letting the model speak."""
        return False

    def order(self, samples: Sequence[Any]) -> Sequence[int]:
        """In what order they are scored, those together that cost least together."""
        return range(len(samples))

    def rehearse(self, samples: Sequence[Any]) -> None:
        """Say, or refuse, before the first step what could not be done with ``samples`` after it."""

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum, count) over the batch."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> list[Prediction]:
        raise NotImplementedError

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The metrics of a split, ``metric`` and ``samples`` among them."""
        raise NotImplementedError

    def each(self, predictions: Sequence[Prediction], metric: str) -> list[float] | None:
        """What each sample counts in ``metric``, where that is their mean; `score` has been asked before."""
        name = {"accuracy": "correct", "mrr": "reciprocal_rank"}.get(metric, metric)
        known = all(isinstance(p.values.get(name), int | float) for p in predictions)
        return [float(p.values[name]) for p in predictions] if known else None

    def details(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """Of tasks with classes: ``per_class`` scores, and their ``confusion``; see `mitrain.tasks.details`."""
        return {}

    def baselines(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """By name, the metrics of what needs no trained model: a score says something only beside them."""
        raise NotImplementedError

    def asked(self, question: Question) -> Any:
        """A question as a sample, whose truth is nothing. ConfigError for what cannot be asked."""
        raise NotImplementedError

    def told(self, question: Question, prediction: Prediction) -> Answer:
        """What a question's ``prediction`` says."""
        raise NotImplementedError

    def answers(self, questions: Sequence[Question], see: Callable[[Sequence[Any]], Batch]) -> list[Answer]:
        """What the model makes of several questions together; ``see``: the batch of several samples."""
        predictions = self.predict(see([self.asked(question) for question in questions]), **self.asking)
        return [self.told(q, q.predicted([p])) for q, p in zip(questions, predictions, strict=True)]

    def ask(self, question: Question) -> Answer:
        """What the model makes of one sample's files."""
        return self.answers([question], lambda samples: question.see(*samples))[0]

    def panel(self, sample: Any, prediction: Prediction, shown: Image.Image) -> Panel:
        """A prediction as a figure has it: what is ``shown`` for the files, lines below it, and whether it went right."""
        raise NotImplementedError


def cautions(
    task: type[Task], samples: Sequence[Any], split: str, known: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """What of a split's score cannot be wrong, or not be right, whatever a model says, in lines.

    ``known``: the answers of training by their prompts, where they are known. DataError where the whole score is decided, so
    that nothing is measured.
    """
    if not samples:
        raise DataError(f"{split} holds no sample, so that nothing is scored: give a split that has some")
    return task.caution(samples, split, known or {})


def look_alike(values: Iterable[str], split: str, what: str) -> list[str]:
    """A line for each of the first pairs of answers or labels that a reader takes for one."""
    pairs = look_alikes(dict.fromkeys(values))[:ALIKE]
    return [f"{split}: the {what}s {one} and {other} count as two" for one, other in pairs]


def only_one(values: Sequence[str], split: str, what: str) -> list[str]:
    """A line where all samples have the same answer or label."""
    counts = Counter(values)
    if len(counts) > 1:
        return []
    return [
        f"{split}: every sample has the {what} {values[0][:60]!r}, so that always giving it is right every time:"
        " a score says nothing of the inputs"
    ]


def require_finite(broken: Sequence[str], total: int, what: str = "the model") -> None:
    """UserError where samples, ``broken`` by their ids, were scored with numbers that are not finite."""
    if broken:
        raise UserError(
            f"{what}: {len(broken)} of {total} samples are scored with numbers that are not finite (the first is"
            f" {broken[0][:80]!r}): the weights are damaged or have diverged; take an earlier checkpoint, or lower train.lr"
        )
