"""Finding the file for a text and the text for a file, a picture or one of another modality; or one file for another.

A dual encoder: linear maps of the file's vector and of the text model's state into one space, trained by contrast
within the batch; every method that adapts an encoder by itself works in it. On top, a matching head reads the state that
the method makes of the text *with* the picture (its joint state, or the infused text state), trained against the hardest
wrong partner in the batch, and orders the best candidates anew: there file and text meet.

Shapes: B samples, N samples of all ranks, D hidden width, d width of the common space, e width of the file's feature.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mitrain.core import dist
from mitrain.core.errors import ConfigError
from mitrain.data.columns import different
from mitrain.data.figures import Panel
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.sources import CaptionSection
from mitrain.models.batch import ModalityInputs
from mitrain.tasks.base import Answer, Batch, Given, Parts, Prediction, Question, Splits, require_finite
from mitrain.tasks.caption import described
from mitrain.tasks.contrast import Everyone
from mitrain.tasks.heads import ReadTask
from mitrain.tasks.momentum import MomentumQueue
from mitrain.tasks.probe import leading, retrieved
from mitrain.tasks.ranks import Gallery, arrows, both_ways, chance, rank_metrics, recall_shares, reranked, ways_between
from mitrain.tasks.readout import See, chunks, evenly, read_out, runs_text, statistics, width_of
from mitrain.tasks.retrieve_config import RetrieveConfig
from mitrain.tasks.template import frame_of

log = logging.getLogger(__name__)

MATCH_ROWS = 128  # pairs that the matching head reads at a time
SCALES = (1.0, 100.0)  # bounds of 1 / temperature
RIDGE_SAMPLES = 20_000  # pairs that maps which start from a ridge regression are fitted to
LEARNER = 95 << 20  # bytes of scikit-learn and what it imports


class RetrieveTask(ReadTask):
    """s(i, t) = cos(A v_i, B h_t) / τ; reranked by s + m, m the matching head's value of the infused state (0 at first).

    Where A, B and m start from a checkpoint's own (`start`), m alone tells right from wrong: pairs are reranked by
    cos + m, as BLIP has it, and the matching loss is that of m.
    """

    settings = RetrieveConfig
    formats = (CaptionSection,)
    truth = ("text",)
    of_samples = ("slow.",)
    metric = "recall_mean"
    shuffles = "files"
    texts_apart = "text"
    takes_candidates = searches = True

    def __init__(self, config: RetrieveConfig, parts: Parts, widths: Mapping[str, int]):
        super().__init__(parts)
        self.config = config
        self.widths, self.modality, self.partner = dict(widths), config.modality or next(iter(widths)), config.partner
        self.between_files = config.partner != "text"
        self.names = (self.partner,) if self.between_files else config.readout
        for key, name in (("modality", self.modality), ("partner", self.partner)):
            if name not in widths and (key, name) != ("partner", "text"):
                raise ConfigError(f"task.{key}={name!r} is none of the modalities: choose of {', '.join(widths)}")
        if self.between_files:
            self.keeps, self.reads_no_text = self.partner, True
            if self.partner == self.modality or config.matching:
                raise ConfigError(
                    "task.partner names another modality than task.modality, and no method makes a state of two files"
                    " together for the matching head to read: set task.matching=0"
                )
        self.ways = ways_between(self.modality, self.partner)
        self.columns = tuple(
            (title, f"{way}_{key}")
            for way, arrow in zip(self.ways, arrows(self.modality, self.partner), strict=True)
            for title, key in ((f"{arrow} R@1", "r1"), ("R@5", "r5"), ("R@10", "r10"), ("median", "median_rank"))
        )
        width = sum(width_of(parts, name, widths) for name in self.names)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        file_width = width_of(parts, self.modality, widths)
        self.seen: dict[str, int] = {}
        if parts.adapter.traits.changes_encoder and self.modality == next(iter(widths)):
            self.seen["file"] = file_width
        if config.matching and parts.adapter.attachment.joint_width:
            self.seen["joint"] = parts.adapter.attachment.joint_width
        for name, size in self.seen.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.file_map = nn.Linear(file_width, config.dim)
        self.partner_map = nn.Linear(width, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(1 / config.temperature).log())
        self.dropout = nn.Dropout(config.dropout)
        if config.matching:
            if not (parts.adapter.traits.text_depends_on_input or parts.adapter.attachment.joint_width):
                raise ConfigError(
                    f"the method {parts.adapter.traits.name!r} makes no state of text and file together for the matching"
                    " head to read: set task.matching=0"
                )
            self.match = nn.Linear(self.seen.get("joint", width), 1)
            nn.init.zeros_(self.match.weight)
            nn.init.zeros_(self.match.bias)
        self.own = self._take_over(parts.text.retrieval_maps)
        self.slow = None
        if config.queue:
            trained = {"adapter": parts.adapter, "file_map": self.file_map, "partner_map": self.partner_map}
            settings = (config.momentum, config.distil, config.ramp, config.queue_start)
            self.slow = MomentumQueue(config.queue, config.dim, trained, *settings)
        self.frame = frame_of(config.template)
        self._ids = cache(self._row)

    @classmethod
    def build(cls, config: RetrieveConfig, given: Given) -> "RetrieveTask":
        if given.batch < dist.world():
            raise ConfigError(f"train.batch={given.batch} is less than a sample for each of {dist.world()} ranks: raise it")
        task = cls(config, given.parts, given.widths)
        if not (task.between_files or getattr(given.data, "texts", True)):
            raise ConfigError("data.texts=false: there is no text to find: set task.partner to another modality")
        for name in [task.modality, *([task.partner] if task.between_files else [])]:
            if name not in given.data.inputs or name in given.data.may_lack:
                raise ConfigError(
                    f"retrieval of {name!r} needs its file of every sample: name it in data.inputs, and not in data.may_lack"
                )
        return task

    @torch.no_grad()
    def _take_over(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
        """Start from a checkpoint's own maps; False, said in a line, where they read something else than is read here."""
        if not maps or self.config.start != "auto" or self.between_files:
            return False
        heads = {"image": self.file_map, "text": self.partner_map}
        heads |= {"match": self.match} if self.config.matching else {}
        needed = {"file", "joint"} if self.config.matching else {"file"}
        read = self.config.readout == ("cls",) and needed <= self.seen.keys()
        if not read or any(maps[name][0].shape != head.weight.shape for name, head in heads.items()):
            log.warning(
                "the checkpoint's own projections and matching head are not used, training starts from new ones: they read"
                " what aurora makes with task.readout=[cls] task.dim=%d; task.start=fresh says that this is meant",
                len(maps["text"][0]),
            )
            return False
        for name, head in heads.items():
            for own, given in zip((head.weight, head.bias), maps[name], strict=True):
                own.copy_(given)
        return True

    def _row(self, text: str) -> list[int]:
        ids = self.parts.text.tokens(text, frame=self.frame, most=self.config.max_tokens)
        return ids or [self.parts.text.tokenizer.eos_token_id]

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        if self.between_files or not (self.config.matching or runs_text(self.config.readout)):
            return []
        return [self._ids(text) for text in sorted(different(samples, "text"))]

    @torch.no_grad()
    def fit(self, samples: Sequence[Any], see: See | None = None) -> None:
        """Mean and standard deviation of the read-outs over the training pairs; a checkpoint's own maps take them raw."""
        if self.own:
            return
        rows = [] if self.between_files else [self._ids(text) for text in evenly(sorted(different(samples, "text")))]
        own = lambda s: self._ids(s.text)  # noqa: E731
        mean, scale = statistics(self.parts, self.names, self.widths, rows, samples, see, own)
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        for name in self.seen:
            read = self.modality if name == "file" else name
            mean, scale = statistics(self.parts, (read,), self.widths, [], samples, see, own)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_scale").copy_(scale)
        if self.config.start == "ridge":
            self._start_from_ridge(samples, see)

    def _start_from_ridge(self, samples: Sequence[Any], see: See) -> None:
        """B = P, A = P R: R the ridge regression of training files' vectors to their partners' standardised states, whose
        strength is chosen on objects left out; P the directions in which what it says differs most (d ≥ D: all).

        The partners' space, made by a model that knows many more than training has, is kept; two maps that are learned
        from nothing keep what tells the training pairs apart.
        """
        files, partners, samples = [], [], evenly(samples, RIDGE_SAMPLES)
        for part in chunks(samples):
            inputs = see(part).inputs
            files.append(self._file_states(inputs))
            partners.append(self._partner_states([s.text for s in part], inputs))
        files, partners = (torch.cat(states).double().cpu().numpy() for states in (files, partners))
        objects = [s.object or s.inputs[self.modality] for s in samples]
        weight, bias, directions = leading(files, partners, objects, self.config.dim)
        for head, value in ((self.file_map, directions @ weight), (self.partner_map, directions)):
            head.weight.zero_()[: len(value)] = torch.from_numpy(value).to(head.weight)
            head.bias.zero_()
        self.file_map.bias[: len(directions)] = torch.from_numpy(directions @ bias).to(self.file_map.bias)

    def bytes_to_fit(self, samples: int) -> int:
        """Of the ridge regression: both sides in float64, and two copies of four fifths of them."""
        width = self.file_map.in_features + self.partner_map.in_features
        return round(8 * 2.6 * width * min(samples, RIDGE_SAMPLES)) + LEARNER if self.config.start == "ridge" else 0

    @torch.no_grad()
    def frozen_states(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D · read-outs): the standardised states without the adapter."""
        with self.parts.adapter.disabled():
            parts = [self.states(texts[i : i + 32], None) for i in range(0, len(texts), 32)]
        return torch.cat(parts).double().cpu().numpy()

    def partner_vectors(self, texts: Sequence[str], inputs: ModalityInputs | None = None) -> Tensor:
        """(B, d) of length 1; of the ``inputs`` where another modality stands in the text's place."""
        return F.normalize(self.partner_map(self.dropout(self._partner_states(texts, inputs))), dim=-1)

    def _partner_states(self, texts: Sequence[str], inputs: ModalityInputs | None) -> Tensor:
        """(B, D) standardised."""
        if self.between_files:
            return (self.parts.adapter.encode(None, inputs).read_out(self.partner) - self.mean) * self.scale
        return self.states(texts, None)

    def file_vectors(self, inputs: ModalityInputs) -> Tensor:
        """(B, d) of length 1."""
        return F.normalize(self.file_map(self.dropout(self._file_states(inputs))), dim=-1)

    def _file_states(self, inputs: ModalityInputs) -> Tensor:
        """(B, e) standardised."""
        return self._standard("file", self.parts.adapter.encode(None, inputs).read_out(self.modality))

    def keys(self, samples: Sequence[Any]) -> list[tuple[str, str]]:
        """Each sample's file and text, or other file: equal ones belong together."""
        return [(s.inputs[self.modality], s.inputs[self.partner] if self.between_files else s.text) for s in samples]

    def _gallery(self, samples: Sequence[Any]) -> Gallery:
        return Gallery(*zip(*self.keys(samples), strict=True), self.ways)

    def _standard(self, name: str, values: Tensor) -> Tensor:
        """What was read of files, standardised where it is not normalised already."""
        if name not in self.seen:
            return values
        return (values - getattr(self, f"{name}_mean")) * getattr(self, f"{name}_scale")

    def sharpness(self) -> Tensor:
        """1 / τ."""
        return self.log_scale.exp().clamp(*SCALES)

    def _beside(self) -> Tensor | float:
        """What a pair's cosine counts beside its matching value."""
        return 1.0 if self.own else self.sharpness()

    def match_values(self, texts: Sequence[str], inputs: ModalityInputs) -> Tensor:
        """(B,) the matching head's values for pairs of a text and a file."""
        if "joint" in self.seen:
            rows = [self._ids(text) for text in texts]
            states = self._standard("joint", read_out(self.parts, rows, ("joint",), inputs)["joint"])
        else:
            states = self.states(texts, inputs)
        return self.match(self.dropout(states)).squeeze(-1)

    # training

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        texts = [s.text for s in batch.samples]
        vectors = lambda: (self.file_vectors(batch.inputs), self.partner_vectors(texts, batch.inputs))  # noqa: E731
        slow = self.slow.slow_vectors(vectors) if self.slow is not None else None  # before what is differentiated
        files, partners = vectors()
        everyone = Everyone(files, partners, batch, self.keys(batch.samples), bool(self.config.matching))
        if slow is None:
            total = everyone.contrast(self.sharpness())
        else:
            total = self.slow.contrast((files, partners), slow, everyone.keys, self.sharpness())
        if self.config.matching:
            total = total + self.config.matching * self._matching(batch, everyone)
        return total, torch.tensor(float(len(texts)), dtype=torch.float64)

    def _matching(self, batch: Batch, everyone: Everyone) -> Tensor:
        """Each sample's pair against its file with the hardest wrong text, and against its text with the hardest
        wrong file: the mean of both cross-entropies over two pairs, summed over samples."""
        own = [s.text for s in batch.samples]
        text, file, known = everyone.hardest()
        wrong = everyone.inputs.rows(file.cpu()).to(self.mean.device)
        texts = [*own, *(everyone.texts[j] for j in text), *own]
        values = self.match_values(texts, ModalityInputs.joined([batch.inputs, batch.inputs, wrong]))
        near = 0.0 if self.own else self.sharpness().detach()
        near = near * everyone.similarity.detach()
        rows = torch.arange(len(own), device=near.device) + everyone.start
        base = torch.cat([near[rows, rows], near[rows, text], near[file, rows]])
        right, other_text, other_file = (values + base).chunk(3)
        losses = F.softplus(other_text - right) + F.softplus(other_file - right)
        return 0.5 * (losses * known).sum()

    # evaluation

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        files = self.file_vectors(batch.inputs).double().cpu().numpy()
        partners = self.partner_vectors([s.text for s in batch.samples], batch.inputs).double().cpu().numpy()
        shown = batch.inputs.to(torch.device("cpu")) if self.config.matching and self.config.rerank else None
        finite = (np.isfinite(files).all(1) & np.isfinite(partners).all(1)).tolist()
        predictions = []
        for row, sample in enumerate(batch.samples):
            values = {} if self.between_files else {"text": sample.text}
            vector = {"file": files[row], "partner": partners[row], "inputs": shown and shown.rows(slice(row, row + 1))}
            predictions.append(Prediction(sample.id, sample.inputs, values, vector=vector, finite=finite[row]))
        return predictions

    @torch.no_grad()
    def score(self, samples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
        gallery = self._gallery(samples)
        files = np.stack([predictions[i].vector["file"] for i in gallery.first])
        partners = np.stack([p.vector["partner"] for p in predictions])
        counts = self._counts(gallery)
        if not (np.isfinite(files).all() and np.isfinite(partners).all()):
            return {"recall_mean": float("nan"), **counts}
        ranks = both_ways(gallery, files, partners)
        decided = gallery.decided()
        metrics = rank_metrics(*ranks, decided, self.ways)
        if self.config.matching and self.config.rerank:
            inputs = [predictions[i].vector["inputs"] for i in gallery.first]
            ranks = self._rerank(gallery, files, partners, inputs, ranks)
            metrics = rank_metrics(*ranks, decided, self.ways) | {"before_reranking": metrics}
        places = {file: int(rank) for file, rank in zip(gallery.files, ranks[0], strict=True)}
        shares = recall_shares(gallery, *ranks, decided)
        for sample, prediction, rank, share in zip(samples, predictions, ranks[1].tolist(), shares, strict=True):
            own = places[sample.inputs[self.modality]]
            prediction.values |= {f"rank_of_{self.partner}": own, f"rank_of_{self.modality}": rank, "recall_mean": share}
        return metrics | counts

    def _counts(self, gallery: Gallery) -> dict[str, int]:
        what = "images" if self.modality == "image" else f"{self.modality}_files"
        return {"samples": len(gallery.texts), what: len(gallery.files)}

    @torch.no_grad()
    def fits(self, batch: Batch, texts: Sequence[str]) -> list[float]:
        """How well each text (or the partner's file of ``batch``) fits its one file: s, and a matching head's value."""
        near = self.partner_vectors(texts, batch.inputs) @ self.file_vectors(batch.inputs)[0]
        near = near * (self._beside() if self.config.matching else self.sharpness())
        if self.config.matching:
            near = near + self.match_values(texts, batch.inputs.rows(torch.zeros(len(texts), dtype=torch.long)))
        return [round(value, 6) for value in near.double().tolist()]

    def _rerank(
        self, gallery: Gallery, files: np.ndarray, partners: np.ndarray, inputs: list[ModalityInputs], ranks: tuple
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks after the best candidates of every query, both ways, are ordered by similarity + matching value."""
        k = min(self.config.rerank, len(files), len(partners))
        near = float(self._beside())
        owned = [set(codes) for codes in gallery.owned]
        to_text = [np.argsort(-(file @ partners.T), kind="stable")[:k] for file in files]
        to_file = [np.argsort(-(one @ files.T), kind="stable")[:k] for one in partners]
        pairs = [(i, t) for i, row in enumerate(to_text) for t in row] + [
            (i, t) for t, row in enumerate(to_file) for i in row
        ]
        values = self._match_pairs(sorted(set(pairs)), gallery, inputs)
        require_finite([gallery.files[i] for i, t in pairs if not math.isfinite(values[i, t])], len(pairs))
        scores = np.array([near * float(files[i] @ partners[t]) + values[i, t] for i, t in pairs]).reshape(-1, k)
        right = np.array([gallery.codes[t] in owned[i] for i, t in pairs]).reshape(-1, k)
        m = len(files)
        return reranked(ranks[0], right[:m], scores[:m]), reranked(ranks[1], right[m:], scores[m:])

    def _match_pairs(
        self, pairs: Sequence[tuple[int, int]], gallery: Gallery, inputs: list[ModalityInputs]
    ) -> dict[tuple[int, int], float]:
        """The matching value of every (file, text); ranks take the pairs in turn and every rank gets all values."""
        values: dict[tuple[int, int], float] = {}
        for start, own in dist.lockstep(range(0, len(pairs), MATCH_ROWS)[dist.rank() :: dist.world()], 0):
            part = pairs[start : start + MATCH_ROWS]
            shown = ModalityInputs.joined([inputs[i] for i, _ in part]).to(self.mean.device)
            matched = self.match_values([gallery.texts[t] for _, t in part], shown).double().tolist()
            values |= dict(zip(part, matched, strict=True)) if own else {}
        return {pair: value for ranks in dist.gather(values) for pair, value in ranks.items()}

    def baselines(self, splits: Splits) -> dict[str, dict[str, Any]]:
        """A random order; a ridge regression and nearest neighbours from the infused features to the frozen text states."""
        features, what = [splits.features(part).numpy() for part in splits.parts], "text states"
        if self.between_files:
            several = [
                dict(zip(self.widths, np.split(x, np.cumsum(list(self.widths.values()))[:-1], 1), strict=True))
                for x in features
            ]
            features, states = ([parts[name] for parts in several] for name in (self.modality, self.partner))
            what = f"{self.partner} features"
        else:
            states = [self.frozen_states([s.text for s in part]) for part in splits.parts]
        galleries = [self._gallery(part) for part in splits.parts]
        made = retrieved(features, states, galleries)
        metrics = {"random order": chance(galleries[2])} | {f"{how} to the {what}": found for how, found in made.items()}
        return {name: values | self._counts(galleries[2]) for name, values in metrics.items()}

    @torch.no_grad()
    def answers(self, questions: Sequence[Question], see: Callable[[Sequence[Any]], Batch]) -> list[Answer]:
        """How well the text, or the partner's file, and the candidates fit each question's file, the best first."""
        answers = []
        for question in questions:
            own = question.inputs[self.partner] if self.between_files else question.text
            choices = list(dict.fromkeys([own, *question.candidates]))
            if self.between_files:
                shown = (see([CaptionSample(question.id, {**question.inputs, self.partner: f}, "")]) for f in choices)
                scores = [value for batch in shown for value in self.fits(batch, [""])]
            else:
                scores = self.fits(see([CaptionSample(question.id, question.inputs, own)]), choices)
            require_finite([question.id] * (not all(map(math.isfinite, scores))), 1, question.what)
            ranked = dict(sorted(zip(choices, scores, strict=True), key=lambda pair: -pair[1]))
            values = {**question.files, **({} if self.between_files else {"text": own}), "scores": ranked}
            if len(choices) > 1:
                values["rank"] = list(ranked).index(own) + 1
            answers.append(Answer(values, [f"{score:7.3f}  {words}" for words, score in ranked.items()]))
        return answers

    def panel(self, sample: Any, prediction: Prediction, shown: Image.Image) -> Panel:
        values, one, other = prediction.values, self.modality, self.partner
        ranks = f"{one} → {other} rank {values[f'rank_of_{other}']}, {other} → {one} rank {values[f'rank_of_{one}']}"
        return Panel(shown, [sample.text or sample.inputs[other], ranks], values[f"rank_of_{one}"] == 1)

    @staticmethod
    def describe(samples: Sequence[CaptionSample]) -> dict[str, Any]:
        texts = Counter(sample.text for sample in samples)
        return described(samples) | {"texts_of_several_samples": sum(count > 1 for count in texts.values())}

    @staticmethod
    def caption(sample: CaptionSample) -> str:
        return sample.text

    @staticmethod
    def caution(samples: Sequence[CaptionSample], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
        if not any(sample.text for sample in samples):
            return []
        return Gallery([sample.files for sample in samples], [sample.text for sample in samples]).caution(split)
