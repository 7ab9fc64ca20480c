"""Classifying a text and files together, one label or several, with a linear head on the frozen language model.

Shapes: B samples, C classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from mitrain.core.errors import ConfigError, DataError
from mitrain.core.user_code import FunctionName
from mitrain.data.columns import column, different
from mitrain.data.figures import Panel
from mitrain.data.formats.labels import LabelSample
from mitrain.data.sources import ClassSection
from mitrain.tasks import details
from mitrain.tasks.base import Answer, Batch, Given, Parts, Prediction, Question, Splits, look_alike, only_one
from mitrain.tasks.heads import HeadConfig, HeadTask
from mitrain.tasks.label_metrics import label_metrics
from mitrain.tasks.probe import probe_labels, probe_neighbours
from mitrain.tasks.readout import See

SHOWN = 5  # classes whose probability a prediction names
FREQUENT = 20  # labels that `describe` lists


class ClassifyConfig(HeadConfig, kind="task", name="classify"):
    """``loss`` is given logits and targets (B, C), these 1 where a sample has the class (`HeadTask.own_loss`)."""

    balance: bool = False
    threshold: float = Field(0.5, gt=0, lt=1)
    loss: FunctionName | None = None

    @model_validator(mode="after")
    def _weighs(self) -> Self:
        if self.loss and self.balance:
            raise ValueError("balance weighs the classes in the cross-entropy, which loss replaces: leave one of them out")
        return self


class ClassifyTask(HeadTask):
    """p = softmax or σ of W x + b, x the standardised read-outs; cross-entropy, or its binary form for every class."""

    settings = ClassifyConfig
    formats = (ClassSection,)
    truth = ("labels",)
    of_samples = ("weight",)
    columns = (
        *(("accuracy", "accuracy"), ("UAR", "uar"), ("macro F1", "f1_macro"), ("weighted F1", "f1_weighted")),
        ("AUROC", "auroc"),
    )
    several = (
        *(("micro F1", "f1_micro"), ("macro F1", "f1_macro"), ("weighted F1", "f1_weighted")),
        *(("samples F1", "f1_samples"), ("AUROC", "auroc")),
    )

    def __init__(
        self, config: ClassifyConfig, parts: Parts, classes: Sequence[str], multilabel: bool, widths: Mapping[str, int]
    ):
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ConfigError(f"data.classes must be two or more different names, not {str(list(classes))[:80]}")
        super().__init__(config, parts, len(classes), widths)
        self.classes, self.multilabel = tuple(classes), multilabel
        self.metric = "f1_micro" if multilabel else "accuracy"
        self.columns = self.several if multilabel else self.columns
        self.number = {name: i for i, name in enumerate(classes)}
        self.register_buffer("weight", torch.ones(len(classes)))

    @classmethod
    def build(cls, config: ClassifyConfig, given: Given) -> "ClassifyTask":
        classes = given.data.classes or given.data.class_names(given.root())
        return cls(config, given.parts, classes, given.data.multilabel, given.widths)

    @torch.no_grad()
    def fit(self, samples: Sequence[Any], see: See | None = None) -> None:
        """Mean and standard deviation of the read-outs, and the classes' weights, over the training samples."""
        if self.config.balance:
            self.weight.copy_(class_weights(self.targets(samples), self.multilabel))
        elif not self.number.keys() >= {label for labels in different(samples, "labels") for label in labels}:
            self.places(samples)  # names the sample
        super().fit(samples, see)

    def targets(self, samples: Sequence[Any]) -> Tensor:
        """(B, C) float: 1 where a sample has the class."""
        targets = torch.zeros(len(samples), len(self.classes))
        targets[self.places(samples)] = 1
        return targets.to(self.mean.device)

    def places(self, samples: Sequence[Any]) -> tuple[list[int], list[int]]:
        """Of each label the sample's number and the class's; DataError where a label is of no class."""
        there = [(i, label) for i, labels in enumerate(column(samples, "labels")) for label in labels]
        numbers = [self.number.get(label) for _, label in there]
        if None in numbers:
            i, label = there[numbers.index(None)]
            raise DataError(f"{samples[i].id[:80]!r} has the label {label[:80]!r}, which training did not know")
        return [i for i, _ in there], numbers

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, targets = self.logits(batch), self.targets(batch.samples)
        if self.config.loss:
            return self.own_loss(logits, targets)
        if self.multilabel:
            values = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=self.weight)
            return values.sum(), torch.tensor(float(values.numel()), dtype=torch.float64)
        truth = targets.argmax(1)
        total = F.cross_entropy(logits, truth, self.weight, reduction="sum")
        return total, self.weight[truth].sum().double()

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        logits = self.logits(batch)
        chances = (logits.sigmoid() if self.multilabel else logits.softmax(-1)).double().cpu().numpy()
        return [self._prediction(s, row) for s, row in zip(batch.samples, chances, strict=True)]

    def _prediction(self, sample: Any, chances: np.ndarray) -> Prediction:
        order = np.argsort(-chances, kind="stable")
        if self.multilabel:
            predicted = [self.classes[c] for c in order if chances[c] >= self.config.threshold]
        else:
            predicted = [self.classes[order[0]]]
        values = {
            "text": sample.text,
            "labels": list(sample.labels),
            "predicted": predicted,
            "correct": set(predicted) == set(sample.labels),
            "probabilities": {self.classes[c]: round(float(chances[c]), 6) for c in order[:SHOWN]},
        }
        return Prediction(sample.id, sample.inputs, values, vector=chances, finite=bool(np.isfinite(chances).all()))

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        truth = self.targets(samples).cpu().numpy() > 0
        chances = np.stack([p.vector for p in predictions])
        return label_metrics(truth, chances, self.multilabel, self.config.threshold)

    def details(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        predicted = np.zeros((len(predictions), len(self.classes)), dtype=bool)
        for i, prediction in enumerate(predictions):
            predicted[i, [self.number[name] for name in prediction.values["predicted"]]] = True
        truth = self.targets(samples).cpu().numpy() > 0
        return details.of_labels(self.classes, truth, predicted, one=not self.multilabel)

    def baselines(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """The training split's commonest label; nearest neighbours on the features that are infused; linear probes on these,
        on the frozen language model's states where texts differ, and on both."""
        truths = [self.targets(part).cpu().numpy() > 0 for part in splits.parts]
        shares, views = truths[0].mean(0), self.frozen_views(splits)
        guesses = {"majority label": np.tile(np.eye(len(shares))[shares.argmax()], (len(splits.chosen), 1))}
        for name, view in views.items():
            guesses[f"linear probe on {name}"] = probe_labels(view, truths[:2], self.multilabel)
        if "the same features" in views:
            guesses["nearest neighbours on the same features"] = probe_neighbours(views["the same features"], truths[:2])
        if self.multilabel:
            guesses["training shares"] = np.tile(shares, (len(splits.chosen), 1))
        threshold = self.config.threshold
        return {name: label_metrics(truths[2], c, self.multilabel, threshold) for name, c in guesses.items()}

    def asked(self, question: Question) -> LabelSample:
        if question.candidates:
            raise ConfigError("--candidates are for the task 'answer'; the classes of 'classify' are trained: leave it out")
        return LabelSample(question.id, question.inputs, question.text, ())

    def told(self, question: Question, prediction: Prediction) -> Answer:
        """The labels, and the likeliest classes with their probabilities."""
        predicted = prediction.values
        chances = predicted["probabilities"]
        values = {**question.files, "text": question.text, "labels": predicted["predicted"], "probabilities": chances}
        lines = [f"{p:7.3f}  {label}" for label, p in chances.items()]
        return Answer(values, [f"labels: {', '.join(predicted['predicted']) or '(none)'}", *lines])

    def panel(self, sample: Any, prediction: Prediction, shown: Image.Image) -> Panel:
        values = prediction.values
        said = ", ".join(f"{name} ({values['probabilities'].get(name, 0):.2f})" for name in values["predicted"][:3])
        truth = f"truth: {', '.join(sample.labels)}"
        return Panel(shown, [said or "(none)", truth, sample.text], values["correct"])

    @staticmethod
    def describe(samples: Sequence[LabelSample]) -> dict[str, Any]:
        counts = Counter(label for sample in samples for label in sample.labels)
        return {
            "objects": len({sample.object for sample in samples if sample.object}),
            "texts": len({sample.text for sample in samples}),
            "without_text": sum(not sample.text.strip() for sample in samples),
            "different": len(counts),
            "majority": round(max(counts.values(), default=0) / len(samples), 4),
            "labels_per_sample": round(counts.total() / len(samples), 4),
            "labels": dict(counts.most_common(FREQUENT)),
        }

    @staticmethod
    def caption(sample: LabelSample) -> str:
        return f"{sample.text} -> {', '.join(sample.labels)}"

    @staticmethod
    def caution(samples: Sequence[LabelSample], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
        sets = [frozenset(sample.labels) for sample in samples]
        if not any(sets):
            raise DataError(f"{split}: no sample has a label, so that no prediction can be right: give labels")
        names = frozenset().union(*sets)
        if len(names) > 1 and all(labels == names for labels in sets):
            return [f"{split}: every sample has all {len(names)} labels, so that always naming all is right every time"]
        lines = look_alike(sorted(names), split, "label")
        return lines + only_one([", ".join(sorted(labels)) for labels in sets], split, "label")


def class_weights(targets: Tensor, multilabel: bool) -> Tensor:
    """(C,) from targets (N, C): for several labels absent ÷ present; for one, weights of mean 1 over the samples.

    A class without samples weighs 1.
    """
    present = targets.sum(0)
    weights = (len(targets) - present) / present if multilabel else len(targets) / ((present > 0).sum() * present)
    return torch.where(present > 0, weights.clamp_min(1e-3), 1.0)
