"""A frozen text encoder whose sentence vector is one more input, beside the text model that the adapter changes.

Shapes: B texts, T tokens, D hidden width.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mitrain.core import parsing
from mitrain.core.config import read_file
from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import loading
from mitrain.models.digests import tokenizer_of
from mitrain.models.encoders.base import Encoder, Entering, cut_to_layer, top_layer
from mitrain.models.encoders.config import EncoderConfig
from mitrain.models.text import TextBackbone

log = logging.getLogger(__name__)

POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
STEP = 16  # tokens: texts whose lengths round up to the same multiple run together


class TextEncoderConfig(EncoderConfig):
    """One frozen encoder of texts. ``max_tokens``: none is what its sentence-transformers files say, or what it can read."""

    takes: Literal["text"] = "text"
    pool: Literal["auto", "cls", "mean", "last"] = "auto"
    max_tokens: int | None = Field(None, ge=3)


class TextEncoder(Encoder):
    """See `Encoder`. ``pool``: what ``auto`` stands for here."""

    enters = True

    def _make(self, settings: Any, source: str | Path, *where: Any) -> None:
        config, (dtype, device, shard) = self.config, where
        if config.shape:
            self.backbone = TextBackbone.empty(settings)
        else:
            self.backbone = TextBackbone.load(source, dtype, device=device, shard=shard)
        self.model, self.settings = self.backbone.model, self.backbone.model.config.get_text_config()
        self.width, self.depth = self.backbone.width, self.backbone.depth
        cut_to_layer(self.model, config, self.depth)
        said = {} if config.shape else sentence_files(config, source)
        self.pool = said.get("pool", "mean") if config.pool == "auto" else config.pool
        self.unit, self.lower = said.get("unit", False), said.get("lower", False)
        if config.pool == "auto" and not said and not config.shape:
            log.warning("%s has no sentence-transformers files: its tokens' mean is taken, or set pool", config.label)
        limits = (config.max_tokens, said.get("max_tokens"), self.backbone.positions)
        self.longest = min(filter(None, limits), default=None)
        self.tokens = self.longest or 512  # the most that are assumed of a text
        self._told = False

    def preprocess(self, decoded: Any, view: int = 0) -> Tensor:
        """(T,) int64: token ids of a `mitrain.data.texts.Text`, with the tokenizer's own opening and closing ones; control
        tokens in it are plain."""
        text = decoded.text.lower() if self.lower else decoded.text
        ids = self.backbone.tokens(text, most=self.longest)
        if self.longest == len(ids) and not self._told:
            texts = self.backbone.texts
            if len(texts.ids(text)) + len(texts.opening) + len(texts.closing) > self.longest:
                self._told = True
                log.warning(
                    "%s reads the first %d tokens of texts: %s is longer, the first of them",
                    self.config.label,
                    self.longest,
                    decoded.where,
                )
        return torch.tensor(ids)

    def blank(self) -> Tensor:
        return torch.tensor(self.backbone.tokens("a"))

    def _size(self, item: Tensor) -> Any:
        return -(-len(item) // STEP)

    def _pooled(self, items: Sequence[Tensor]) -> Tensor:
        ids, mask = self.backbone.pad([item.tolist() for item in items])
        with top_layer(self.model) as seen:
            final = self.backbone.hidden(ids, mask)
        states, lengths = (seen[-1] if self.config.layer else final).float(), mask.sum(1, keepdim=True)
        if self.pool == "mean":
            vectors = (states * mask[..., None]).sum(1) / lengths
        else:
            vectors = states[:, 0] if self.pool == "cls" else states[torch.arange(len(items)), lengths[:, 0] - 1]
        return torch.nn.functional.normalize(vectors, dim=-1) if self.unit else vectors

    def _entering(self, depth: int, items: Sequence[Tensor]) -> Sequence[Entering]:
        return [(row, len(row)) for row in self.backbone.trunk([item.tolist() for item in items], depth)]

    def _preprocessing(self) -> Any:
        words = json.dumps(tokenizer_of(self.backbone.tokenizer)) if self.backbone.tokenizer else ""
        tokenizer = hashlib.sha256(words.encode()).hexdigest()
        return {"tokenizer": tokenizer, "longest": self.longest, "pool": self.pool, "unit": self.unit, "lower": self.lower}


def sentence_files(config: TextEncoderConfig, source: str | Path) -> dict[str, Any]:
    """What an encoder's sentence-transformers files say: ``pool``, ``unit`` (length one), ``max_tokens``, ``lower``.

    {} where it has none; ConfigError where they make a sentence's vector in a way that is not known, and ``pool`` is auto.
    """
    said: dict[str, Any] = {}
    if path := loading.find(source, "sentence_bert_config.json"):
        values = read_file(path)
        longest = values.get("max_seq_length")
        said = {"max_tokens": longest if isinstance(longest, int) else None, "lower": values.get("do_lower_case") is True}
    if config.pool != "auto" or not (path := loading.find(source, "1_Pooling/config.json")):
        return said
    modes = pooling_modes(path)
    kinds = modules_of(source)
    odd = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if len(modes) != 1 or modes[0] not in POOLING or odd:
        raise ConfigError(
            f"{config.label} makes a sentence's vector by {', '.join(modes + odd) or 'nothing'}, which is unknown: set pool"
        )
    return said | {"pool": POOLING[modes[0]], "unit": "Normalize" in kinds}


def pooling_modes(path: Path) -> list[str]:
    return [name for name, on in read_file(path).items() if name.startswith("pooling_mode_") and on is True]


def pooling(source: str | Path) -> str | None:
    """How a model was trained to make a text's vector: cls, mean or last; None where its folder does not say."""
    path = loading.find(source, "1_Pooling/config.json")
    modes = pooling_modes(path) if path else []
    return POOLING.get(modes[0]) if len(modes) == 1 else None


def modules_of(source: str | Path) -> list[str]:
    """The types of the modules that a sentence-transformers model names."""
    if (path := loading.find(source, "modules.json")) is None:
        return []
    try:
        return [str(entry["type"]).rpartition(".")[2] for entry in parsing.read_json(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{str(path)!r} names no modules ({error}): get the original file") from None
