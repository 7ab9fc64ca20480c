"""Rating a text and files together with a number, such as a sentiment, with a linear head on the frozen language model.

Shapes: B samples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mitrain.core.errors import ConfigError, DataError
from mitrain.core.user_code import FunctionName
from mitrain.data.columns import column
from mitrain.data.figures import Panel
from mitrain.data.formats.targets import TargetSample
from mitrain.data.sources import TargetSection
from mitrain.tasks.base import Answer, Batch, Given, Parts, Prediction, Question, Splits, only_one
from mitrain.tasks.heads import HeadConfig, HeadTask
from mitrain.tasks.number_metrics import number_metrics
from mitrain.tasks.probe import probe_neighbours, probe_numbers
from mitrain.tasks.readout import See

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss, "huber": F.huber_loss}


class RegressConfig(HeadConfig, kind="task", name="regress"):
    """``loss``: of the standardised numbers: l1, mse, or huber, which is ½ d² up to a distance of 1 and linear beyond; or a
    function of the user's own, of outputs and truths (B,) (`HeadTask.own_loss`). The rest as in `HeadConfig`."""

    loss: Literal["l1", "mse", "huber"] | FunctionName = "l1"


class RegressTask(HeadTask):
    """y = m + s (W x + b), x the standardised read-outs, m and s the mean and standard deviation of the training targets.

    The loss compares W x + b with (target − m) / s.
    """

    settings = RegressConfig
    formats = (TargetSection,)
    truth = ("target",)
    of_samples = ("target_range",)
    metric = "mae"
    minimises = True
    columns = (
        *(("MAE", "mae"), ("Pearson", "pearson"), ("Spearman", "spearman"), ("R²", "r2")),
        *(("acc-7", "acc7"), ("acc-2", "acc2_positive"), ("F1", "f1_positive")),
    )

    def __init__(self, config: RegressConfig, parts: Parts, widths: Mapping[str, int]):
        super().__init__(config, parts, 1, widths)
        self.register_buffer("target_mean", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("target_std", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("target_range", torch.zeros(2, dtype=torch.float64))

    @classmethod
    def build(cls, config: RegressConfig, given: Given) -> "RegressTask":
        return cls(config, given.parts, given.widths)

    @torch.no_grad()
    def fit(self, samples: Sequence[Any], see: See | None = None) -> None:
        """Statistics of the read-outs and of the targets over the training samples; DataError where these are all equal."""
        targets = self.targets(samples)
        if not targets.max() > targets.min():
            raise DataError(f"every training sample has the target {targets[0].item():g}: a regression needs different ones")
        self.target_mean.copy_(targets.mean())
        self.target_std.copy_(targets.std(correction=0))
        self.target_range.copy_(torch.stack([targets.min(), targets.max()]))
        super().fit(samples, see)

    def targets(self, samples: Sequence[Any]) -> Tensor:
        """(B,) float64."""
        return torch.tensor([*column(samples, "target")], dtype=torch.float64, device=self.target_mean.device)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        standard = self.logits(batch).squeeze(-1)
        truth = ((self.targets(batch.samples) - self.target_mean) / self.target_std).to(standard.dtype)
        if self.config.loss not in LOSSES:
            return self.own_loss(standard, truth)
        total = LOSSES[self.config.loss](standard, truth, reduction="sum")
        return total, torch.tensor(float(len(truth)), dtype=torch.float64)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        numbers = self.target_mean + self.target_std * self.logits(batch).squeeze(-1).double()
        return [self._prediction(s, y) for s, y in zip(batch.samples, numbers.tolist(), strict=True)]

    def _prediction(self, sample: Any, number: float) -> Prediction:
        values = {"text": sample.text, "target": sample.target, "predicted": number}
        return Prediction(sample.id, sample.inputs, values, vector=number, finite=math.isfinite(number))

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        return self._metrics(samples, np.array([p.vector for p in predictions]))

    def _metrics(self, samples: Sequence[Any], predicted: np.ndarray) -> dict[str, Any]:
        return number_metrics(np.array([s.target for s in samples]), predicted, tuple(self.target_range.tolist()))

    def baselines(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """The training targets' mean and median; nearest neighbours on the features that are infused; ridge regressions on
        these, on the frozen language model's states where texts differ, and on both."""
        truths = [np.array([s.target for s in part]) for part in splits.parts[:2]]
        guesses = {
            "training mean": np.full(len(splits.chosen), np.mean(truths[0])),
            "training median": np.full(len(splits.chosen), np.median(truths[0])),
        }
        views = self.frozen_views(splits)
        guesses |= {f"ridge regression on {name}": probe_numbers(view, truths) for name, view in views.items()}
        if "the same features" in views:
            guesses["nearest neighbours on the same features"] = probe_neighbours(views["the same features"], truths)
        return {name: self._metrics(splits.chosen, predicted) for name, predicted in guesses.items()}

    def asked(self, question: Question) -> TargetSample:
        if question.candidates:
            raise ConfigError("--candidates are for the task 'answer'; 'regress' says a number: leave it out")
        return TargetSample(question.id, question.inputs, question.text, 0.0)

    def told(self, question: Question, prediction: Prediction) -> Answer:
        number = prediction.vector
        return Answer({**question.files, "text": question.text, "predicted": number}, [f"predicted: {number:.4f}"])

    def panel(self, sample: Any, prediction: Prediction, shown: Image.Image) -> Panel:
        return Panel(shown, [f"{prediction.vector:.2f}", f"truth: {sample.target:g}", sample.text])

    @staticmethod
    def describe(samples: Sequence[TargetSample]) -> dict[str, Any]:
        targets = np.array([sample.target for sample in samples])
        numbers = {"least": targets.min(), "mean": targets.mean(), "greatest": targets.max(), "std": targets.std()}
        return {
            "objects": len({sample.object for sample in samples if sample.object}),
            "texts": len({sample.text for sample in samples}),
            "without_text": sum(not sample.text.strip() for sample in samples),
            "different": len(set(targets.tolist())),
            "targets": {name: round(float(value), 4) for name, value in numbers.items()},
        }

    @staticmethod
    def caption(sample: TargetSample) -> str:
        return f"{sample.text} -> {sample.target:g}"

    @staticmethod
    def caution(samples: Sequence[TargetSample], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
        return only_one([f"{sample.target:g}" for sample in samples], split, "target")
