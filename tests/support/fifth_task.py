"""A task in one file, as an outsider would add it: the tests register it in TASKS and touch nothing else.

It rates a picture and a text with a number, which stands where `answer` has its answer.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mitrain.core.config import Section
from mitrain.data.figures import Panel
from mitrain.data.formats.records import AnswerSample
from mitrain.data.sources import RecordsConfig
from mitrain.tasks.base import Answer, Batch, Parts, Prediction, Question, Splits, Task
from mitrain.tasks.readout import read_out


class RateConfig(Section, kind="task", name="rate"):
    """``offset``: what is predicted before the first step."""

    offset: float = 0.0


class RateTask(Task):
    """y = w · x + b, x the last token's state and y a number; the loss is (y − truth)², the metric 1 − |y − truth|."""

    settings = RateConfig
    formats = (RecordsConfig,)
    metric = "closeness"
    texts_apart = "prompt"
    columns = (("closeness", "closeness"),)

    def __init__(self, config: RateConfig, parts: Parts):
        super().__init__(parts)
        self.head = nn.Linear(parts.text.width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, config.offset)

    def _rows(self, samples: Sequence[Any]) -> list[list[int]]:
        return [self.parts.text.tokens(sample.prompt) for sample in samples]

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        return self._rows(samples)

    def tokens(self, samples: Sequence[Any]) -> int:
        return sum(map(len, self._rows(samples)))

    def rates(self, batch: Batch) -> Tensor:
        """(B,)."""
        return self.head(read_out(self.parts, self._rows(batch.samples), ("last",), batch.inputs)["last"]).squeeze(-1)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rates = self.rates(batch)
        truth = torch.tensor([float(sample.answer) for sample in batch.samples], device=rates.device)
        return (rates - truth).square().sum(), torch.tensor(float(len(truth)), dtype=torch.float64)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        rates = self.rates(batch)
        pairs = zip(batch.samples, rates.isfinite().tolist(), rates.tolist(), strict=True)
        return [Prediction(s.id, s.inputs, {"rate": rate}, finite=finite) for s, finite, rate in pairs]

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        return closeness(samples, lambda i: predictions[i].values["rate"])

    def baselines(self, splits: Splits) -> dict[str, dict[str, Any]]:
        train, _, chosen = splits.parts
        usual = statistics.fmean(float(sample.answer) for sample in train)
        return {"training mean": closeness(chosen, lambda _: usual)}

    def asked(self, question: Question) -> AnswerSample:
        return AnswerSample(question.id, question.inputs, question.text, "")

    def told(self, question: Question, prediction: Prediction) -> Answer:
        rate = prediction.values["rate"]
        return Answer({**question.files, "rate": rate}, [f"rate: {rate:.3f}"])

    def panel(self, sample: Any, prediction: Prediction, shown: Image.Image) -> Panel:
        return Panel(shown, [f"{prediction.values['rate']:.2f}", f"truth: {sample.answer}"])

    @staticmethod
    def describe(samples: Sequence[Any]) -> dict[str, Any]:
        return {"mean": statistics.fmean(float(sample.answer) for sample in samples)}

    @staticmethod
    def caption(sample: Any) -> str:
        return f"{sample.prompt} -> {sample.answer}"

    @staticmethod
    def caution(samples: Sequence[Any], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
        alike = len({float(sample.answer) for sample in samples}) < 2
        return [f"{split}: every sample has the same number"] if alike else []


def closeness(samples: Sequence[Any], rate: Callable[[int], float]) -> dict[str, float]:
    distances = [abs(rate(i) - float(sample.answer)) for i, sample in enumerate(samples)]
    return {"closeness": 1 - statistics.fmean(distances), "samples": len(samples)}
