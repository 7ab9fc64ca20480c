"""Answering a question about a picture through the frozen language head.

The prompt is text alone; the picture can reach the answer only through the infusion. Trained by cross-entropy over the
full vocabulary on the answer's tokens; scored by likelihood among candidates and by generation (exact match).

Shapes: B samples, R rows (a sample and one of its candidates), T tokens, V vocabulary.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mitrain import dist
from mitrain.config import Section
from mitrain.tasks.base import Batch, Parts, Prediction, Task
from mitrain.tasks.template import fill, template_with

SCORE_ROWS = 112


class AnswerConfig(Section, kind="task", name="answer"):
    """``template``: how the prompt is put to the model. ``normalize``: candidates' log-likelihood per token instead of
    its sum. ``max_new_tokens``: bound of generated answers."""

    template: template_with("prompt") = "{prompt}"
    normalize: bool = False
    max_new_tokens: int = Field(8, ge=1, le=512)


class AnswerTask(Task):
    """loss = − Σ_t log p(answer_t | prompt, answer_<t, image) over the answer's tokens and its end."""

    metric = "accuracy"
    speaks = True
    columns = (("accuracy", "accuracy"), ("exact match", "exact_match"))

    def __init__(self, config: AnswerConfig, parts: Parts):
        super().__init__(parts)
        self.config = config
        self._prompt_ids = cache(lambda prompt: parts.text.tokens(fill(self.config.template, prompt)))
        self._answer_ids = cache(
            lambda answer: [*parts.text.tokens(" " + answer, start=False), parts.text.tokenizer.eos_token_id]
        )

    def row(self, prompt: str, answer: str) -> list[int]:
        """Token ids of a prompt with an answer. The last one (the end) predicts nothing and is left out."""
        return [*self._prompt_ids(prompt), *self._answer_ids(answer)[:-1]]

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        rows = {(s.prompt, s.answer) for s in samples}
        if every_candidate:
            rows |= {(s.prompt, c) for s in samples for c in s.candidates}
        return [self.row(*pair) for pair in sorted(rows)]

    def tokens(self, samples: Sequence[Any]) -> int:
        return sum(len(self.row(s.prompt, s.answer)) for s in samples)

    def _log_likelihood(self, pairs: Sequence[tuple[str, str]], features: Tensor | None) -> list[Tensor]:
        """log p of each answer's tokens (its end included) for each (prompt, answer); features (R, e)."""
        text, states = self.parts.text, self.parts.states
        rows = [self.row(*pair) for pair in pairs]
        answers = [self._answer_ids(answer) for _, answer in pairs]
        ids, mask = text.pad(rows)
        spans = [range(len(row) - len(answer), len(row)) for row, answer in zip(rows, answers, strict=True)]
        row_index = torch.tensor([r for r, span in enumerate(spans) for _ in span], device=ids.device)
        positions = torch.tensor([p for span in spans for p in span], device=ids.device)
        targets = torch.tensor([token for answer in answers for token in answer], device=ids.device)
        below = states.batch(rows)
        with self.parts.adapter.bind(self.parts.adapter.modalities_of(features)):
            picked = text.log_likelihood(ids, mask, row_index, positions, targets, below, states.depth)
        return list(picked.split([len(answer) for answer in answers]))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        likelihood = torch.cat(self._log_likelihood([(s.prompt, s.answer) for s in batch.samples], batch.features))
        return -likelihood.sum(), torch.tensor(float(likelihood.numel()), dtype=torch.float64)

    @torch.no_grad()
    def candidate_scores(self, batch: Batch) -> list[Tensor]:
        """For each sample the log-likelihood of each of its candidates."""
        pairs = [(s.prompt, c) for s in batch.samples for c in s.candidates]
        owner = torch.tensor([i for i, s in enumerate(batch.samples) for _ in s.candidates])
        scores: list[Tensor] = []
        for start, own in dist.in_step(range(0, len(pairs), SCORE_ROWS)):
            part = slice(start, start + SCORE_ROWS)
            features = batch.features[owner[part].to(batch.features.device)] if batch.features is not None else None
            found = self._log_likelihood(pairs[part], features)
            for token_scores in found if own else ():
                scores.append(token_scores.double().mean() if self.config.normalize else token_scores.double().sum())
        return list(torch.stack(scores).split([len(s.candidates) for s in batch.samples]))

    @torch.no_grad()
    def generate(self, batch: Batch, num_beams: int = 1) -> list[str]:
        """What the model says on its own: greedy (or beam) decoding with a KV cache."""
        text = self.parts.text
        ids, mask = text.pad([self._prompt_ids(s.prompt) for s in batch.samples], side="left")
        with self.parts.adapter.bind(self.parts.adapter.modalities_of(batch.features), copies=num_beams):
            out = text.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.config.max_new_tokens,
                synced_gpus=text.sharded,
                num_beams=num_beams,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=text.tokenizer.eos_token_id,
                pad_token_id=text.tokenizer.pad_token_id,
            )
        return [
            answer.strip() for answer in text.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        ]

    def predict(self, batch: Batch, generate: bool = False) -> list[Prediction]:
        samples = [s if s.candidates else replace(s, candidates=(s.answer,)) for s in batch.samples]
        scores = self.candidate_scores(replace(batch, samples=samples))
        said = self.generate(batch) if generate else [None] * len(samples)
        return [self._prediction(s, score, words) for s, score, words in zip(samples, scores, said, strict=True)]

    def _prediction(self, sample: Any, score: Tensor, said: str | None) -> Prediction:
        ranked = sorted(zip(score.softmax(0).tolist(), sample.candidates, strict=True), reverse=True)
        values = {
            "prompt": sample.prompt,
            "answer": sample.answer,
            "predicted": ranked[0][1],
            "correct": ranked[0][1] == sample.answer,
            "probabilities": {candidate: round(p, 6) for p, candidate in ranked},
            "kind": sample.kind,
        }
        if said is not None:
            values |= {"generated": said, "exact_match": said == sample.answer}
        return Prediction(sample.id, sample.image, values)

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        values = [p.values for p in predictions]
        by_kind = defaultdict(list)
        for v in values:
            by_kind[v["kind"]].append(v["correct"])
        result = {"accuracy": mean(v["correct"] for v in values), "samples": len(values)}
        result["majority"] = max(Counter(s.answer for s in samples).values()) / len(samples)
        if len(by_kind) > 1:
            result |= {f"accuracy/{kind}": mean(hits) for kind, hits in sorted(by_kind.items())}
        if all("exact_match" in v for v in values):
            result["exact_match"] = mean(v["exact_match"] for v in values)
        return result

    def lines(self, sample: Any, prediction: Prediction) -> tuple[list[str], bool | None]:
        values = prediction.values
        chance = values["probabilities"][values["predicted"]]
        said = f"{values['predicted']} ({chance:.2f})"
        return [said, f"truth: {sample.answer} [{sample.object}]", sample.prompt], values["correct"]


def mean(hits: Any) -> float:
    hits = list(hits)
    return sum(hits) / len(hits) if hits else 0.0
