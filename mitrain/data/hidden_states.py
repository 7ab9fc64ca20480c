"""What enters the first layer that a method changes: of the text model per text, of another encoder per file.

Everything below is frozen, so it is computed once (or, with the cache off, whenever it is asked for).
Shapes: B samples, T tokens, D width of the text model, N tokens of an encoder's file, c width of its layers.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mitrain.data.cache import FeatureCache
from mitrain.data.encoded import Progress, no_progress
from mitrain.data.segments import Item
from mitrain.models import Encoder, TextBackbone, loading

log = logging.getLogger(__name__)


class TextStates:
    """What leaves the frozen trunk of ``depth`` layers, per text (a row of token ids).

    ``always``: also where nothing is cached, for methods that run the layers themselves. ``disabled`` takes off what changes
    the model meanwhile.
    """

    def __init__(
        self,
        text: TextBackbone,
        depth: int,
        cache: Path | None,
        always: bool = False,
        disabled: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.text, self.depth, self.always, self.disabled = text, depth, always, disabled
        self.wanted = cache is not None and depth > 0
        identity = text.identity(depth) if self.wanted else {}
        self.store = FeatureCache(cache / "texts" if self.wanted else None, identity, {"states": "float32"})

    @cached_property
    def cached(self) -> bool:
        """Whether states are kept: where that is wanted and the model can go on from them, which it is asked once."""
        if not self.wanted or self.always:
            return self.wanted
        with self.disabled():
            able = self.text.replays(self.depth)
        if not able:
            log.warning(
                "%s cannot go on from the cached states of its lower layers: texts run through all layers every time",
                type(self.text.model).__name__,
            )
        return able

    @staticmethod
    def key(row: Sequence[int]) -> str:
        return hashlib.sha256(np.asarray(row, dtype=np.int64).tobytes()).hexdigest()

    def prepare(self, rows: Sequence[Sequence[int]], progress: Progress = no_progress) -> int:
        """Compute what is not in the cache yet, similar lengths together; returns how many texts that were."""
        self.text.tell_unknown(rows)
        if not self.cached:
            return 0
        by_key = {self.key(row): row for row in sorted(rows, key=len)}

        def compute(keys: Sequence[str]) -> dict[str, Item]:
            states = self.text.trunk([by_key[key] for key in keys], self.depth)
            return {key: {"states": s.float().cpu().numpy()} for key, s in zip(keys, states, strict=True)}

        together = loading.holds_shards(self.text.model)
        return self.store.fill(by_key, compute, progress=progress, together=together)

    def batch(self, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """(B, T, D), right-padded with zeros; None when there is no cache and the model must run from its bottom."""
        if not self.cached:
            return self._padded(self.text.trunk(rows, self.depth)) if self.always else None
        by_key = {self.key(row): row for row in rows}

        def compute(keys: Sequence[str]) -> dict[str, Item]:
            return {key: {"states": self.text.trunk([by_key[key]], self.depth)[0].float().cpu().numpy()} for key in keys}

        items = self.store.read([self.key(row) for row in rows], compute, loading.holds_shards(self.text.model))
        return self._padded([torch.from_numpy(np.array(item["states"])) for item in items])

    def _padded(self, items: Sequence[Tensor]) -> Tensor:
        out = torch.zeros(len(items), max(map(len, items)), self.text.width, dtype=self.text.dtype)
        for i, item in enumerate(items):
            out[i, : len(item)] = item
        return out.to(self.text.device)


class EncoderStates:
    """What enters layer ``depth`` of an encoder, per file and view, kept in 16 bits."""

    def __init__(self, encoder: Encoder, depth: int, cache: Path | None):
        self.encoder, self.depth = encoder, depth
        identity = {**encoder.identity(), "enters layer": depth} if cache else {}
        kind = encoder.config.takes
        folder = "pictures" if kind == "image" else f"{kind}-states"
        dtypes = {"states": "float16"} | ({} if kind == "image" else {"shown": "float32"})
        self.store = FeatureCache(cache / folder if cache else None, identity, dtypes)

    @property
    def width(self) -> int:
        """c; of a Swin's first stage it is not that of its last."""
        encoder, settings = self.encoder, self.encoder.settings
        if encoder.feature_map:
            return encoder.width
        return settings.embed_dim if hasattr(settings, "depths") and not self.depth else settings.hidden_size

    def encode(self, contents: Sequence[Any], views: Sequence[int]) -> list[Item]:
        """One item for each of the files' ``contents``, as they are or preprocessed: ``states``, and (1, 1) how many of
        them are ``shown``, where files have different numbers."""
        entering = self.encoder.entering(self.depth, contents, views)
        if isinstance(entering, Tensor):
            return [{"states": row.float().cpu().numpy()} for row in entering]
        return [{"states": row.float().cpu().numpy(), "shown": np.full((1, 1), shown)} for row, shown in entering]
