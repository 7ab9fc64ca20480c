"""Answering a question about a picture through the frozen language head.

The prompt is text alone; the picture can reach the answer only through the infusion. Trained by cross-entropy over the
full vocabulary on the answer's tokens; scored by likelihood among answers to choose from, or by generation (exact match).

Shapes: R rows (a sample and one of its candidates).
"""

import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from pydantic import model_validator
from torch import Tensor

from mitrain.core import dist
from mitrain.core.errors import ConfigError
from mitrain.data.columns import column
from mitrain.data.figures import Panel
from mitrain.data.formats.records import AnswerSample, commonest
from mitrain.data.released import VqaConfig
from mitrain.data.sources import ConversationsConfig, RecordsConfig
from mitrain.models import release
from mitrain.models.tokens import TextOrTurns
from mitrain.tasks import details
from mitrain.tasks.base import Answer, Batch, Parts, Prediction, Question, Splits, look_alike, only_one
from mitrain.tasks.language import LanguageConfig, LanguageTask
from mitrain.tasks.probe import chosen_by_ridge, probe_answers
from mitrain.tasks.soft_accuracy import AGREE, soft_accuracy
from mitrain.tasks.template import TurnSetting, frame_of, template_with

log = logging.getLogger(__name__)
SCORE_ROWS = 112
FREQUENT = 20  # answers that `describe` lists
MEANS = {"exact_match": "exact_match", "soft_accuracy": "soft_accuracy", "mrr": "reciprocal_rank"}
"""Metrics that are means of what each prediction says, where all say it."""
MOST_ANSWERS = 100
"""Of how many training answers to its prompt one is chosen for a sample without candidates; beyond, the model speaks."""


class AnswerConfig(LanguageConfig, kind="task", name="answer"):
    """The template's special tokens act, those in a user's text are plain text."""

    template: template_with("prompt") = "{prompt}"
    turn: TurnSetting = ""
    normalize: bool = False

    @model_validator(mode="after")
    def _turns(self) -> Self:
        if self.turn and self.chat:
            raise ValueError("turn is the chat template's with chat=true: leave turn out")
        if self.turn and len(frame_of(self.template)) > 2:
            raise ValueError("turn stands before the prompt, which template names twice: name it once")
        return self


class AnswerTask(LanguageTask):
    """loss = − Σ_t log p(answer_t | prompt, answer_<t, image) over the answer's tokens and its end; the answer of a sample
    with several references is the commonest.

    A prediction is the likeliest of the sample's candidates, ties counting against the truth. A sample without a choice
    of them has that of the answers that training gave to its prompt; where these are fewer than two or more than
    `MOST_ANSWERS`, it is right where what the model says equals the answer (`same_text`).
    """

    settings = AnswerConfig
    formats = (RecordsConfig, VqaConfig, ConversationsConfig)
    truth = ("answer", "candidates", "references")
    metric = "accuracy"
    remembers = True
    asks = "prompt"
    takes_candidates = True
    asking = {"generate": True}
    columns = (("accuracy", "accuracy"), ("exact match", "exact_match"), ("soft accuracy", "soft_accuracy"))

    def __init__(self, config: AnswerConfig, parts: Parts):
        super().__init__(config, parts)
        self.known: Mapping[str, Sequence[str]] = {}

    def pair(self, sample: Any) -> tuple[TextOrTurns, str]:
        return self.words(sample), sample.answer

    def words(self, sample: Any) -> TextOrTurns:
        """The prompt, or the turns of a conversation where the settings say how they are put to the model."""
        return sample.turns if sample.turns and self.config.turn else sample.prompt

    def remember(self, samples: Sequence[Any]) -> None:
        self.known = answers_by_prompt(samples)

    def offered(self, sample: Any) -> tuple[str, ...]:
        """What the sample's answer is chosen from, two or more; nothing where the model has to say it."""
        own = tuple(dict.fromkeys(sample.candidates))
        known = tuple(self.known.get(sample.prompt, ()))
        return own if len(own) > 1 else known if 1 < len(known) <= MOST_ANSWERS else ()

    def must_generate(self, samples: Sequence[Any]) -> bool:
        return not all(map(self.offered, samples))

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        rows = {self.pair(s) for s in samples}
        if every_candidate:
            rows |= {(self.words(s), c) for s in samples for c in self.offered(s)}
            for sample in samples:
                if not self.offered(sample):
                    self.prompt_ids(self.words(sample))  # raises where what the model says would not fit behind it
        return [self.row(*pair) for pair in sorted(rows, key=lambda pair: (isinstance(pair[0], tuple), pair))]

    @torch.no_grad()
    def candidate_scores(self, batch: Batch) -> list[Tensor]:
        """For each sample the log-likelihood of each answer that it is `offered`."""
        offered = [self.offered(s) for s in batch.samples]
        shown = [None if batch.inputs is None else i for i in range(len(offered))]
        asked = [(shown[i], self.words(s), c) for i, s in enumerate(batch.samples) for c in offered[i]]
        places = {one: place for place, one in enumerate(dict.fromkeys(asked))}  # what was asked before is not scored again
        pairs, owner = [(words, c) for _, words, c in places], [i or 0 for i, *_ in places] or [0]
        begun = self.beginnings(pairs, batch.inputs, owner, SCORE_ROWS) if pairs else None
        spare = [self.pair(batch.samples[0])]  # for a rank that only keeps the others company
        scores = torch.zeros(len(pairs), dtype=torch.float64)
        order = sorted(range(len(pairs)), key=lambda i: len(self.row(*pairs[i])))  # little padding
        for start, own in dist.lockstep(range(0, len(pairs), SCORE_ROWS), 0):
            part = order[start : start + SCORE_ROWS]
            rows = torch.tensor([owner[i] for i in part or [0]])
            inputs = batch.inputs and batch.inputs.rows(rows.to(batch.inputs.device))
            read = begun and begun[0].rows(begun[1][part])
            found = self.log_likelihood([pairs[i] for i in part] or spare, inputs, read)
            if begun is not None:
                found = [torch.cat(both) for both in zip(begun[2][part].split(1), found, strict=True)]
            for i, tokens in zip(part, found, strict=True) if own else ():
                scores[i] = tokens.double().mean() if self.config.normalize else tokens.double().sum()
        return list(scores[[places[one] for one in asked]].split([len(names) for names in offered]))

    def generate(self, batch: Batch) -> list[str]:
        """What the model says of each sample on its own."""
        return [said for said, _ in self.spoken(batch.samples, batch.inputs)]

    def predict(self, batch: Batch, generate: bool = False) -> list[Prediction]:
        scores = self.candidate_scores(batch)
        speaks = generate or self.must_generate(batch.samples)
        said = self.spoken(batch.samples, batch.inputs) if speaks else [(None, True)] * len(scores)
        return [self._prediction(s, score, *spoken) for s, score, spoken in zip(batch.samples, scores, said, strict=True)]

    def _prediction(self, sample: Any, score: Tensor, words: str | None, numbers: bool = True) -> Prediction:
        values = {"prompt": sample.prompt, "answer": sample.answer, "kind": sample.kind}
        if self.offered(sample):
            values |= self._chosen(sample, score)
        else:
            values |= {"predicted": words, "correct": same_text(words, sample.answer), "scored_by": "generation"}
        if words is not None:
            values |= {"generated": words, "exact_match": same_text(words, sample.answer)}
        if len(sample.references) > 1:
            values["soft_accuracy"] = soft_accuracy(values["predicted"], sample.references)
        return Prediction(sample.id, sample.inputs, values, finite=numbers and bool(score.isfinite().all()))

    def _chosen(self, sample: Any, score: Tensor) -> dict[str, Any]:
        """The likeliest of the answers offered; of equal ones the truth comes last, then the alphabet decides."""
        offered = self.offered(sample)
        order = sorted(range(len(offered)), key=lambda i: (-score[i].item(), offered[i] == sample.answer, offered[i]))
        chances = score.softmax(0).tolist()
        return {
            "predicted": offered[order[0]],
            "correct": offered[order[0]] == sample.answer,
            "reciprocal_rank": next((1 / (at + 1) for at, i in enumerate(order) if offered[i] == sample.answer), 0.0),
            "probabilities": {offered[i]: round(chances[i], 6) for i in order},
            "scored_by": "candidates" if len(set(sample.candidates)) > 1 else "training answers",
        }

    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        values = [p.values for p in predictions]
        scores = accuracies([v["kind"] for v in values], [v["correct"] for v in values])
        result: dict[str, Any] = {"accuracy": scores.pop("accuracy"), "samples": len(values)}
        result["majority"] = max(Counter(s.answer for s in samples).values()) / len(samples)
        result |= scores
        for name, value in MEANS.items():
            if all(value in v for v in values):
                result[name] = mean(v[value] for v in values)
        ways = Counter(v["scored_by"] for v in values)
        return result | ({"scored_by": dict(ways)} if set(ways) != {"candidates"} else {})

    def details(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        """Answers as classes, where all were chosen among candidates."""
        values = [p.values for p in predictions]
        if any(v["scored_by"] == "generation" for v in values):
            return {}
        return details.of_answers([v["answer"] for v in values], [v["predicted"] for v in values])

    def baselines(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """The majority answer, also of each kind of question; a linear probe on the features that are infused, and, where it
        cannot know the answers, a ridge regression to the words offered."""
        probed, chosen = probe_answers(splits.features, *splits.parts)
        most = commonest([s.answer for s in splits.chosen])
        rows = {"majority answer": [most] * len(splits.chosen)}
        by_kind: dict[str, list[str]] = defaultdict(list)
        for sample in splits.chosen:
            by_kind[sample.kind].append(sample.answer)
        if len(by_kind) > 1:
            usual = {kind: commonest(answers) for kind, answers in by_kind.items()}
            rows["majority answer to each kind of question"] = [usual[s.kind] for s in splits.chosen]
        rows["linear probe on the same features"] = [probed[s.id] for s in splits.chosen]
        if nearest := chosen_by_ridge(splits.features, self.word_vectors, self.offered, *splits.parts):
            rows["ridge regression to the words offered"] = [nearest.get(s.id, probed[s.id]) for s in splits.chosen]
        scores = {name: scores_of(splits.chosen, said) for name, said in rows.items()}
        scores["linear probe on the same features"]["inverse_regularisation"] = chosen
        return scores

    @torch.no_grad()
    def word_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D): of each text the mean of its tokens' embeddings in the language model."""
        table = self.parts.text.model.get_input_embeddings()
        tokens = [self.parts.text.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] or [0] for text in texts]
        ids = torch.tensor([token for row in tokens for token in row], device=self.parts.text.device)
        with release.borrowed(table):
            parts = table(ids).double().cpu().split([len(row) for row in tokens])
        return torch.stack([part.mean(0) for part in parts]).numpy()

    def asked(self, question: Question) -> AnswerSample:
        candidates = question.candidates
        if candidates and len(set(candidates)) < 2:
            raise ConfigError(f"--candidates {candidates[0][:60]} leaves nothing to choose: give two or more, or none")
        return AnswerSample(question.id, question.inputs, question.text, "", tuple(candidates), turns=question.turns)

    def told(self, question: Question, prediction: Prediction) -> Answer:
        """What the model says, and the likeliest of the candidates, or of the answers that training gave to this prompt."""
        predicted = prediction.values
        values = {**question.files, "prompt": question.text, "generated": predicted["generated"]}
        values["answer"] = predicted["predicted"]
        lines = [f"answer: {predicted['predicted']}", f"says: {predicted['generated']}"]
        if "probabilities" in predicted:
            values["probabilities"] = predicted["probabilities"]
            lines += [f"{p:7.3f}  {candidate}" for candidate, p in predicted["probabilities"].items()]
        return Answer(values, lines)

    def panel(self, sample: Any, prediction: Prediction, shown: Image.Image) -> Panel:
        values = prediction.values
        chance = values.get("probabilities", {}).get(values["predicted"])
        said = values["predicted"] if chance is None else f"{values['predicted']} ({chance:.2f})"
        return Panel(shown, [said, f"truth: {sample.answer} [{sample.object}]", sample.prompt], values["correct"])

    @staticmethod
    def describe(samples: Sequence[AnswerSample]) -> dict[str, Any]:
        kinds = defaultdict(Counter)
        for sample in samples:
            kinds[sample.kind or "answer"][sample.answer] += 1
        return {
            "objects": len({sample.object for sample in samples if sample.object}),
            "kinds": {
                kind: {
                    "samples": answers.total(),
                    "different": len(answers),
                    "majority": round(max(answers.values()) / answers.total(), 4),
                    "answers": dict(answers.most_common(FREQUENT)),
                }
                for kind, answers in kinds.items()
            },
        }

    @staticmethod
    def caption(sample: AnswerSample) -> str:
        return f"{sample.prompt} -> {sample.answer}"

    @staticmethod
    def caution(samples: Sequence[AnswerSample], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
        answers = [sample.answer for sample in samples]
        lines = [*look_alike(answers, split, "answer"), *only_one(answers, split, "answer")]
        few = sum(1 < len(sample.references) <= AGREE for sample in samples)
        if few:
            lines.append(
                f"{split}: {few} samples have two or three references: their soft accuracy, which asks for {AGREE} besides"
                " the one left out, cannot reach 1"
            )
        without = [sample for sample in samples if len(set(sample.candidates)) < 2]
        if not without:
            return lines
        ranked = [sample for sample in without if 1 < len(known.get(sample.prompt, ())) <= MOST_ANSWERS]
        unseen = sum(sample.answer not in known[sample.prompt] for sample in ranked)
        one = sum(len(sample.candidates) > 0 for sample in without)
        single = f" ({one} have one, which cannot be wrong)" if one else ""
        lines.append(
            f"{split}: {len(without)} of {len(samples)} samples have no candidates to choose from{single}: {len(ranked)} are"
            f" ranked among the training answers to their prompt, {len(without) - len(ranked)} are right where the generated"
            " text is the answer"
        )
        if unseen:
            lines.append(f"{split}: {unseen} samples have an answer that training never gave to their prompt: always wrong")
        return lines


def answers_by_prompt(samples: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """The answers that samples have, and may choose from, by their prompts, in alphabetical order."""
    answers_of: dict[str, set[str]] = defaultdict(set)
    for prompt, choices, answer in zip(*(column(samples, n) for n in ("prompt", "candidates", "answer")), strict=True):
        answers_of[prompt] |= {*choices, answer}
    return {prompt: tuple(sorted(answers)) for prompt, answers in answers_of.items()}


def accuracies(kinds: Sequence[str], hits: Sequence[bool]) -> dict[str, float]:
    """The accuracy, and where there are several kinds of question that of each."""
    by_kind = defaultdict(list)
    for kind, hit in zip(kinds, hits, strict=True):
        by_kind[kind].append(hit)
    several = {f"accuracy/{kind}": mean(own) for kind, own in sorted(by_kind.items())} if len(by_kind) > 1 else {}
    return {"accuracy": mean(hits)} | several


def scores_of(samples: Sequence[Any], said: Sequence[str]) -> dict[str, Any]:
    """What a baseline that says ``said`` reaches."""
    pairs = list(zip(samples, said, strict=True))
    result = accuracies([s.kind for s in samples], [s.answer == answer for s, answer in pairs])
    result["samples"] = len(samples)
    if all(len(s.references) > 1 for s in samples):
        result["soft_accuracy"] = mean(soft_accuracy(answer, s.references) for s, answer in pairs)
    return result


def same_text(one: str, other: str) -> bool:
    """Whether two answers are equal but for case, white space and the punctuation around them."""
    return plain(one) == plain(other)


def plain(answer: str) -> str:
    """Composed Unicode in folded case, with single blanks; no punctuation at the ends, unless there is nothing else."""
    words = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    return words.strip(".,;:!?\"'` ") or words


def mean(hits: Iterable[float]) -> float:
    values = list(hits)
    return sum(values) / len(values)
