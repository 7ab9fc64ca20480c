"""Describing a picture in words of the frozen language head, and scoring them against several people's descriptions."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, Field

from mitrain.core.errors import ConfigError, DataError
from mitrain.data.columns import different
from mitrain.data.figures import Panel
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.formats.records import commonest
from mitrain.data.sources import CaptionSection
from mitrain.tasks.base import Answer, Batch, Prediction, Question, Splits
from mitrain.tasks.caption_metrics import caption_metrics
from mitrain.tasks.language import LanguageConfig, LanguageTask
from mitrain.tasks.probe import unit
from mitrain.tasks.template import LONGEST, frame_of

CHUNK = 1024  # pictures whose nearest neighbours are looked for at once


def fixed(template: str) -> str:
    """``template``, if it has no field; else ValueError."""
    if len(frame_of(template)) > 1:
        raise ValueError("this template has no field: write the words that captions go on from, {{ and }} for braces")
    return template


class CaptionConfig(LanguageConfig, kind="task", name="caption"):
    """``template``: the words that a caption goes on from; special tokens act. The rest as in `LanguageConfig`."""

    template: Annotated[str, Field(max_length=LONGEST), AfterValidator(fixed)] = "A picture of"
    max_new_tokens: int = Field(30, ge=1, le=512)


class CaptionTask(LanguageTask):
    """Trained on every caption, by the loss of `LanguageTask`; each picture is described once and compared with all of its
    captions in the split (`caption_metrics`)."""

    settings = CaptionConfig
    formats = (CaptionSection,)
    truth = ("text", "captions")
    metric = "cider"
    reads_no_text = True
    shuffles = "files"
    texts_apart = "text"
    columns = (("CIDEr", "cider"), ("BLEU-4", "bleu4"), ("ROUGE-L", "rouge_l"), ("different", "different"))

    def pair(self, sample: Any) -> tuple[str, str]:
        return "", sample.text

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        if every_candidate:
            self.prompt_ids("")  # raises where what the model says would not fit behind it
        return [self.row("", text) for text in sorted(different(samples, "text"))]

    def must_generate(self, samples: Sequence[Any]) -> bool:
        return True

    @torch.no_grad()
    def predict(self, batch: Batch, generate: bool = True) -> list[Prediction]:
        """What the model says; of samples that show it the same it is asked once."""
        shown = keys_of(batch)
        first = {key: shown.index(key) for key in shown}
        rows = list(first.values())
        inputs = batch.inputs and batch.inputs.rows(torch.tensor(rows, device=batch.inputs.device))
        said = dict(zip(first, self.spoken([batch.samples[i] for i in rows], inputs), strict=True))
        return [
            Prediction(s.id, s.inputs, {"predicted": words, "captions": list(s.captions)}, finite=finite)
            for s, (words, finite) in ((s, said[key]) for s, key in zip(batch.samples, shown, strict=True))
        ]

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        return scores_of(samples, [p.values["predicted"] for p in predictions])

    def baselines(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """The commonest training caption for all, and that of the training picture whose features are the most similar."""
        train, chosen = splits.parts[0], splits.chosen
        one = list({s.files: s for s in train}.values())
        known, asked = (unit(splits.features(part).numpy()) for part in (one, chosen))
        near = [i for start in range(0, len(asked), CHUNK) for i in (asked[start : start + CHUNK] @ known.T).argmax(1)]
        return {
            "commonest caption": scores_of(chosen, [commonest([s.text for s in train])] * len(chosen)),
            "caption of the nearest picture": scores_of(chosen, [one[i].text for i in near]),
        }

    def asked(self, question: Question) -> CaptionSample:
        if question.candidates:
            raise ConfigError("--candidates are for the task 'answer'; 'caption' speaks freely: leave it out")
        return CaptionSample(question.id, question.inputs, question.text)

    @torch.no_grad()
    def answers(self, questions: Sequence[Question], see: Callable[[Sequence[Any]], Batch]) -> list[Answer]:
        """What the model says, and how likely it finds the text: the mean of log p over its tokens."""
        batch, answers = see([self.asked(question) for question in questions]), []
        predictions = self.predict(batch)
        for question, prediction, likelihood in zip(
            questions, predictions, self.log_likelihood([self.pair(s) for s in batch.samples], batch.inputs), strict=True
        ):
            said = question.predicted([prediction]).values["predicted"]
            values = {**question.files, "caption": said, "text": question.text}
            values["log_likelihood"] = round(likelihood.double().mean().item(), 6)
            answers.append(Answer(values, [f"says: {said}", f"{values['log_likelihood']:7.3f}  {question.text}"]))
        return answers

    def panel(self, sample: Any, prediction: Prediction, shown: Image.Image) -> Panel:
        return Panel(shown, [prediction.values["predicted"], *(f"truth: {text}" for text in references(sample)[:2])])

    @staticmethod
    def describe(samples: Sequence[CaptionSample]) -> dict[str, Any]:
        return described(samples)

    @staticmethod
    def caption(sample: CaptionSample) -> str:
        return sample.text

    @staticmethod
    def caution(samples: Sequence[CaptionSample], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
        several = {sample.files: frozenset(references(sample)) for sample in samples}
        if len(set(several.values())) < 2:
            raise DataError(
                f"{split}: every picture has the same captions, so that CIDEr, which weighs words by how few pictures have"
                " them, is 0 whatever a model says: give pictures with captions of their own"
            )
        return []


def keys_of(batch: Batch) -> list[bytes]:
    """What each sample shows the model, its features and which of them are there: under a control not what its files say."""
    if batch.inputs is None:
        return [b""] * len(batch.samples)
    there = [present[:, None].float() for present in batch.inputs.present.values()]
    return [row.tobytes() for row in torch.cat([batch.inputs.feature.float(), *there], 1).cpu().numpy()]


def references(sample: Any) -> tuple[str, ...]:
    """All captions of a sample's picture."""
    return sample.captions or (sample.text,)


def scores_of(samples: Sequence[Any], said: Sequence[str]) -> dict[str, Any]:
    """The metrics of what is ``said`` of each sample's picture; ``different``: how many captions there are of them, as a
    share of the pictures."""
    last = {s.files: i for i, s in enumerate(samples)}
    own, several = [said[i] for i in last.values()], [references(samples[i]) for i in last.values()]
    counts = {"samples": len(samples), "images": len(own), "captions": sum(map(len, several))}
    return {**caption_metrics(own, several), "different": len(set(own)) / len(own), **counts}


def described(samples: Sequence[CaptionSample]) -> dict[str, Any]:
    """Of what kind captions are, for ``data inspect``."""
    each = Counter(sample.files for sample in samples)
    return {
        "objects": len({sample.object for sample in samples if sample.object}),
        "texts": len({sample.text for sample in samples}),
        "captions_per_image": dict(sorted(Counter(each.values()).items())),
        "mean_words": round(float(np.mean([len(sample.text.split()) for sample in samples])), 2),
    }
