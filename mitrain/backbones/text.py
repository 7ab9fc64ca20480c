"""The frozen language model with its tokenizer.

Shapes: B batch, T tokens, D hidden width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from mitrain import hf
from mitrain.backbones import trunk
from mitrain.backbones.vision import frozen_digest
from mitrain.errors import DataError, ModelError


class TextBackbone:
    """A frozen causal language model; an adapter attaches to ``.model``."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any):
        self.model = model
        self.tokenizer = tokenizer
        hf.freeze(model)

    @classmethod
    def load(
        cls,
        source: str | Path,
        dtype: torch.dtype,
        attention: str = "sdpa",
        device: torch.device | str = "cpu",
    ) -> "TextBackbone":
        model = hf.load(
            AutoModelForCausalLM,
            source,
            "language model",
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention,
        )
        tokenizer = hf.load(AutoTokenizer, source, "tokenizer")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {str(source)!r} has no end-of-text token: answers could not end; use another"
            )
        return cls(model.to(device), tokenizer)

    @classmethod
    def empty(cls, config: PretrainedConfig) -> "TextBackbone":
        """Shapes without weights or a tokenizer, for ``--dry-run``."""
        return cls(hf.empty_model(AutoModelForCausalLM, config), None)

    @staticmethod
    def read_config(source: str | Path) -> PretrainedConfig:
        return hf.load(AutoConfig, source, "language model's configuration")

    @property
    def depth(self) -> int:
        return len(hf.decoder_layers(self.model))

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def tokens(self, text: str, *, start: bool = True) -> list[int]:
        """Token ids; ``start`` adds the tokenizer's own opening tokens, if it has any."""
        ids = self.tokenizer(text, add_special_tokens=start)["input_ids"]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and len(ids) > limit:
            raise DataError(f"a text of {len(ids)} tokens is longer than the model's {limit}: shorten {text[:60]!r}…")
        return ids

    def pad(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask``, both (B, T)."""
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            ids[i, where] = torch.tensor(row, dtype=torch.long)
            mask[i, where] = 1
        return ids.to(self.device), mask.to(self.device)

    def logits(self, ids: Tensor, mask: Tensor, keep: Tensor, states: Tensor | None = None, depth: int = 0) -> Tensor:
        """(B, len(keep), V): what the frozen head says at the positions ``keep`` (a 1-D index tensor)."""
        return self._run(self.model, ids, mask, states, depth, logits_to_keep=keep).logits

    def hidden(self, ids: Tensor, mask: Tensor, states: Tensor | None = None, depth: int = 0) -> Tensor:
        """(B, T, D): the hidden states after the final norm."""
        return self._run(self.model.base_model, ids, mask, states, depth).last_hidden_state

    def _run(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, states: Tensor | None, depth: int, **kwargs: Any
    ) -> Any:
        if states is None:
            return model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs)
        with trunk.replay(self.model, depth, states):
            return model(inputs_embeds=states, attention_mask=mask, use_cache=False, **kwargs)

    def trunk(self, rows: Sequence[Sequence[int]], depth: int) -> list[Tensor]:
        """What leaves the ``depth`` bottom layers for each row of token ids: a list of (T_i, D)."""
        ids, mask = self.pad(rows)
        states = trunk.trunk_states(self.model, depth, ids, mask)
        return [states[i, : len(row)] for i, row in enumerate(rows)]

    @torch.no_grad()
    def embeddings(self, ids: Tensor) -> Tensor:
        """(B, T, D): the input embeddings."""
        return self.model.get_input_embeddings()(ids)

    def identity(self, depth: int) -> dict[str, Any]:
        """What the trunk's states depend on: the caches' address."""
        layers = hf.decoder_layers(self.model)[:depth]
        return {
            "embeddings": frozen_digest(self.model.get_input_embeddings()),
            "layers": [frozen_digest(layer) for layer in layers],
            "dtype": str(self.model.dtype),
            "type": self.model.config.model_type,
            "depth": depth,
        }
