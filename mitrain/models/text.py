"""The frozen language model with its tokenizer.

Shapes: B batch, T tokens, D hidden width, V vocabulary.
"""

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from mitrain.core import dist
from mitrain.core.errors import ConfigError, DataError, ModelError
from mitrain.models import blip, frozen, layouts, loading, quant, release, stream
from mitrain.models.begun import Begun, places_of
from mitrain.models.chunked_loss import called_as, chunked_cross_entropy, is_trained
from mitrain.models.digests import frozen_digest, settings_of, tokenizer_of, weights_of
from mitrain.models.reading import only_read
from mitrain.models.stream import Shard, Unread
from mitrain.models.tokens import WHOLE, TextOrTurns, Tokens, last_of

log = logging.getLogger(__name__)

PROBE = "The picture shows a thing that lies on the left of another."
UNKNOWN = 0.2
"""The share of unknown tokens from which on a tokenizer was made for other texts."""


def factory(config: PretrainedConfig) -> Any:
    """The transformers class that reads it: a causal language model's, or a plain encoder's.

    An encoder is what transformers knows as a masked language model and what was not made a decoder, as BERT; and the
    text encoder of BLIP.
    """
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return AutoModel if encoder or blip.is_blip(config) else AutoModelForCausalLM


def is_read(name: str) -> bool:
    """Whether a tensor of a text model counts: an encoder's pooler is read by no method and no task."""
    return "pooler" not in name.split(".")


def texts_or(states: Tensor | None, ids: Tensor) -> dict[str, Tensor]:
    """What a model is called with: ``ids``, or the ``states`` that stand for what its lower layers make of them."""
    return {"input_ids": ids} if states is None else {"inputs_embeds": states}


class TextBackbone:
    """A frozen text model, a causal language model or an encoder as BERT; an adapter attaches to ``.model``.

    ``dtype``: of its activations. ``quantize``: how its layers' matrices are held, none for floats. ``sharded``: its
    weights lie on all ranks, which must therefore run it equally often. ``source``: where they were read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        dtype: torch.dtype | None = None,
        quantize: str = "none",
        sharded: bool = False,
        source: str | Path | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.dtype = dtype or model.dtype
        self.quantize = quantize
        self.sharded = sharded
        self.source = source
        self._settings = settings_of(model.config, source)
        loading.freeze(model)

    @classmethod
    def load(
        cls,
        source: str | Path,
        dtype: torch.dtype,
        attention: str = "sdpa",
        device: torch.device | str = "cpu",
        quantize: str = "none",
        quantize_embedding: bool = False,
        shard: Shard | None = None,
        unread: Unread = stream.nothing,
    ) -> "TextBackbone":
        """``shard``: spreads the weights over the ranks, layer by layer as rank 0 reads them. ``unread``: what is read when
        it is called, where the checkpoint's names are the model's own."""
        config = cls.read_config(source)
        quantize = checked_precision(quantize, quantize_embedding, config, source)
        if blip.is_blip(config):
            if quantize != "none" or shard is not None:
                raise ConfigError("BLIP's encoders are held whole and in floats: set model.quantize=none, zero.stage=0")
            model = blip.load(source, "text_encoder", dtype)
        elif quantize == "none" and shard is None and unread is stream.nothing:
            options = {"config": config, "dtype": dtype, "attn_implementation": attention}
            model = loading.load_model(factory(config), source, "language model", is_read, **options)
        else:
            going: set[nn.Module] = set()  # of shards: what could wait unread must be spread before it can be let go of

            def spread(name: str, unit: nn.Module) -> None:
                shard(unit)
                release.leave_shards(going & set(unit.modules()))

            def wanted(model: PreTrainedModel) -> Collection[nn.Module]:
                going.update(unread(model))
                return ()

            model = stream.load(
                factory(config),
                source,
                dtype,
                quantize,
                embedding=quantize_embedding,
                device=device,
                after=stream.keep if shard is None else spread,
                reads=shard is None or dist.is_main(),
                used=is_read,
                unread=unread if shard is None else wanted,
                attn_implementation=attention,
            )
            release.watch(model, source)
        tokenizer = read_tokenizer(source)
        if tokenizer.eos_token_id is None and factory(config) is AutoModel:
            tokenizer.eos_token = tokenizer.sep_token
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {str(source)!r} has no end-of-text token: answers could not end; use another"
            )
        made = cls(model if shard else model.to(device), tokenizer, dtype, quantize, shard is not None, source)
        if tokenizer.eos_token_id >= made.vocabulary:
            raise ModelError(
                f"the tokenizer of {str(source)!r} ends texts with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}),"
                f" and the language model embeds {made.vocabulary} tokens: give the tokenizer that belongs to it"
            )
        return made

    @classmethod
    def empty(
        cls,
        config: PretrainedConfig,
        dtype: torch.dtype = torch.float32,
        attention: str | None = None,
        quantize: str = "none",
        quantize_embedding: bool = False,
    ) -> "TextBackbone":
        """Shapes without weights or a tokenizer, for ``--dry-run`` and plans."""
        if blip.is_blip(config):
            return cls(blip.empty(config, "text_encoder").to(dtype), None)
        options = {"attn_implementation": attention} if attention else {}
        made = cls(loading.empty_model(factory(config), config, dtype=dtype, **options), None, dtype, quantize)
        if quantize != "none":
            quant.quantise(made.model, quantize, embedding=quantize_embedding)
        return made

    @staticmethod
    def read_config(source: str | Path) -> PretrainedConfig:
        return loading.read_config(source, "language model")

    @property
    def speaks(self) -> bool:
        """Whether it has a language head."""
        return self.model.get_output_embeddings() is not None

    @property
    def retrieval_maps(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Maps that the checkpoint's own retrieval reads its states with (see `mitrain.models.blip`), or {}."""
        return blip.maps_of(self.model)

    @property
    def depth(self) -> int:
        return len(layouts.layers_of(self.model))

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def texts(self) -> Tokens:
        return Tokens(self.tokenizer)

    def tokens(
        self, text: str, *, frame: Sequence[str] = WHOLE, most: int | None = None, strip: str | None = " "
    ) -> list[int]:
        """Token ids of ``text`` in its ``frame``, with the tokenizer's own opening and closing tokens, if it has any.

        ``most``: how many ids there may be; a longer text loses its end. What then is longer than the model can read
        raises DataError. ``strip`` as in `Tokens.ids`.
        """
        opening, ids, closing = self.texts.opening, self.texts.ids(text, frame, strip=strip), self.texts.closing
        self._embedded(ids, text)
        if most is not None:
            ids = ids[: max(most - len(opening) - len(closing), 1)]
        return self._readable([*opening, *ids, *closing], text, "shorten" if most is None else "lower task.max_tokens for")

    def plain(self, text: str) -> list[int]:
        """Token ids of a text of any length by itself, without opening and closing tokens."""
        ids = self.texts.ids(text)
        self._embedded(ids, text)
        return ids

    def prompt(self, text: TextOrTurns, frame: Sequence[str] = WHOLE, speaks: int = 1) -> list[int]:
        """`Tokens.prompt` of a text that the model can read and say ``speaks`` tokens behind; else DataError."""
        ids = self._readable(self.texts.prompt(text, frame), last_of(text))
        if self.positions and len(ids) + speaks - 1 > self.positions:  # the last token that is said is not read
            raise DataError(
                f"a prompt of {len(ids)} tokens leaves no room for {speaks} more in the model's {self.positions}: lower"
                f" task.max_new_tokens, or shorten {last_of(text)[:60]!r}…"
            )
        return ids

    def answered(self, text: TextOrTurns, answer: str, frame: Sequence[str] = WHOLE) -> tuple[list[int], int]:
        """`Tokens.answered` of texts that the model can read; else DataError."""
        row, start = self.texts.answered(text, answer, frame)
        return self._readable(row, last_of(text)), start

    def _readable(self, ids: list[int], text: str, mend: str = "shorten") -> list[int]:
        self._embedded(ids, text)
        if self.positions and len(ids) > self.positions:
            raise DataError(
                f"a text of {len(ids)} tokens is longer than the model's {self.positions}: {mend} {text[:60]!r}…"
            )
        return ids

    def _embedded(self, ids: Sequence[int], text: str) -> None:
        """DataError where ``text`` has a token that the model has no embedding for."""
        if ids and max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise DataError(
                f"the text {text[:60]!r} has the token {token!r} (id {max(ids)}), and the language model embeds"
                f" {self.vocabulary} tokens: take it out of the text, or give the tokenizer that belongs to the model"
            )

    def tell_unknown(self, rows: Sequence[Sequence[int]]) -> None:
        """A line where many of the texts' token ids ``rows`` stand for what the tokenizer does not know."""
        unknown, ends = self.tokenizer.unk_token_id, (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        if unknown is None or unknown in ends:  # byte-level tokenizers know everything; GPT-2's name is for all three
            return
        share = sum(row.count(unknown) for row in rows) / max(sum(map(len, rows)), 1)
        if share > UNKNOWN:
            log.warning(
                "%.0f %% of the texts' tokens are unknown (%s) to the tokenizer of %s: the model cannot read what they say",
                100 * share,
                self.tokenizer.unk_token,
                self.source,
            )

    @cached_property
    def positions(self) -> int | None:
        """`mitrain.models.loading.positions` of the model."""
        return loading.positions(self.model)

    @cached_property
    def vocabulary(self) -> int:
        """How many tokens the model can read and, where it speaks, say."""
        said = getattr(self.model.get_output_embeddings(), "out_features", None)
        read = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        return min(n for n in (said, read, self.model.config.get_text_config().vocab_size) if n)

    @property
    def pad_id(self) -> int:
        """What stands where the mask hides it: the tokenizer's padding if the model embeds it, else its end of text."""
        padding = self.tokenizer.pad_token_id
        return padding if padding is not None and padding < self.vocabulary else self.tokenizer.eos_token_id

    def probe(self, side: str = "right") -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask`` of two short texts, one of them padded: to try the model on."""
        row = [i % self.vocabulary for i in self.tokenizer(PROBE)["input_ids"]][:6]
        return self.pad([row, row[: max(len(row) // 2, 1)]], side)

    def replays(self, depth: int) -> bool:
        """Whether the model can go on from what leaves its ``depth`` bottom layers."""
        with release.passing(self.model):
            return frozen.reproduces(self.model, depth, *self.probe())

    def pad(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask``, both (B, T).

        Behind the mask stands the text's own last (or first) token. A padding token is often embedded as zeros, which a
        model that scales states by their own size, as Gemma 3n, has no gradient at: 0 × inf, NaN in the whole batch.
        """
        length = max(map(len, rows))
        ids, mask = [], []
        for row in rows:
            own, hidden = list(row), length - len(row)
            edge = [own[-1 if side == "right" else 0] if own else self.pad_id] * hidden
            ids.append(own + edge if side == "right" else edge + own)
            mask.append([1] * len(own) + [0] * hidden if side == "right" else [0] * hidden + [1] * len(own))
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    @torch.no_grad()
    def begin(
        self, ids: Tensor, mask: Tensor, rows: Tensor, targets: Tensor, states: Tensor | None = None, depth: int = 0
    ) -> tuple[Begun, Tensor] | None:
        """The beginnings of texts, (B, L) padded on the left, read; with ``states`` from layer ``depth`` on. And (n,) log p
        of the tokens ``targets`` right behind the texts ``rows``, both (n,).

        None where the model keeps something else than keys and values: of all tokens, to go on from ``states``.
        """
        kinds = (DynamicLayer,) if states is not None else (DynamicLayer, DynamicSlidingWindowLayer)
        if not self._keeps_tokens(DynamicCache(config=self.model.config), kinds):
            return None
        last = torch.arange(len(ids), device=ids.device), -1  # whose logits are made once, whatever stands behind
        found, cache = self._picked(ids, mask, last, rows, targets, states, depth, Begun(None, mask[:, :0]))
        if cache is None or not self._keeps_tokens(cache, kinds):
            return None
        for layer in cache.layers[:depth] if states is not None else ():  # the first one is asked how many tokens are read
            layer.update(*(states.new_empty(*ids.shape, 1)[:, None] for _ in "kv"))
        return Begun(cache, mask), found

    @torch.no_grad()
    def begin_alike(self, ids: Tensor, mask: Tensor, depth: int, conditioned: AbstractContextManager[Any]) -> Cache | None:
        """What the model keeps of the beginnings of texts, (B, L) padded on the left, where half of them repeat others: what
        the ``depth`` bottom layers make of a text is made once, the rest inside ``conditioned``. None where they do not, and
        as `begin`."""
        texts, which = torch.unique(torch.cat([ids, mask], 1), dim=0, return_inverse=True)
        below = DynamicCache(config=self.model.config)
        if 2 * len(texts) > len(ids) or not self._keeps_tokens(below, (DynamicLayer,)):
            return None
        once, shown = texts.chunk(2, 1)
        given = {"attention_mask": shown, "position_ids": places_of(shown), "past_key_values": below, "use_cache": True}
        states = frozen.trunk_states(self.model, depth, input_ids=once, **given)[which]
        below.batch_select_indices(which)
        with conditioned:
            cache = self._run(self.model.base_model, ids, mask, states, depth, Begun(None, mask[:, :0])).past_key_values
        if not self._keeps_tokens(cache, (DynamicLayer,)):
            return None
        cache.layers[:depth] = below.layers[:depth]
        return cache

    def _keeps_tokens(self, cache: Cache, kinds: tuple[type, ...]) -> bool:
        """Whether its layers keep what ``kinds`` do; behind the model's own ones a method may keep something, too."""
        return all(type(layer) in kinds for layer in cache.layers[: len(layouts.layers_of(self.model))])

    @property
    def goes_on(self) -> bool:
        """Whether it can `begin` texts: it is told the tokens' positions."""
        return "position_ids" in inspect.signature(self.model.base_model.forward).parameters

    def log_likelihood(self, ids: Tensor, mask: Tensor, rows: Tensor, positions: Tensor, targets: Tensor, *more) -> Tensor:
        """(n,) float: log p of the tokens ``targets`` at ``positions`` of the texts ``rows``, all (n,).

        The head runs at these positions alone, and a plain frozen one over a part of its vocabulary at a time. ``more`` as
        of `hidden`.
        """
        return self._picked(ids, mask, (rows, positions), None, targets, *more)[0]

    def _picked(
        self, ids: Tensor, mask: Tensor, places: tuple[Any, Any], which: Tensor | None, targets: Tensor, *more
    ) -> tuple[Tensor, Cache | None]:
        """(n,) log p of ``targets``, each at its one of ``places`` (at ``which``, if they share some); and what the model
        keeps of the texts."""
        head = self.model.get_output_embeddings()
        plain, whole = is_plain_head(self.model) and not is_trained(head), head.forward
        with only_read(ids, places):
            if plain:
                out = self._run(self.model.base_model, ids, mask, *more)
            else:
                with called_as(head, lambda hidden: whole(hidden[places])):
                    out = self._run(self.model, ids, mask, *more)
        cache = getattr(out, "past_key_values", None)
        if plain:
            return -chunked_cross_entropy(out.last_hidden_state[places], head, targets, rows=which), cache
        logits = out.logits.float()
        if which is None:
            return -F.cross_entropy(logits, targets, reduction="none"), cache
        return logits.log_softmax(-1)[which, targets], cache

    def hidden(self, ids: Tensor, mask: Tensor, *more) -> Tensor:
        """(B, T, D): the hidden states after the final norm. ``more``: states, depth and begun of `_run`."""
        return self._run(self.model.base_model, ids, mask, *more).last_hidden_state

    def _run(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        mask: Tensor,
        states: Tensor | None = None,
        depth: int = 0,
        begun: Begun | None = None,
    ) -> ModelOutput:
        """The forward pass of ``model`` from ``states`` at layer ``depth`` on, behind what is ``begun``."""
        past = {"attention_mask": mask, "use_cache": False} if begun is None else begun.goes_on(mask)
        with nullcontext() if states is None else frozen.replay(self.model, depth, states):
            return model(**texts_or(states, ids), **past)

    def trunk(self, rows: Sequence[Sequence[int]], depth: int) -> list[Tensor]:
        """What leaves the ``depth`` bottom layers for each row of token ids: a list of (T_i, D)."""
        ids, mask = self.pad(rows)
        states = frozen.trunk_states(self.model, depth, input_ids=ids, attention_mask=mask)
        return [states[i, : len(row)] for i, row in enumerate(rows)]

    @torch.no_grad()
    def embeddings(self, ids: Tensor) -> Tensor:
        """(B, T, D): the input embeddings."""
        return self.model.get_input_embeddings()(ids)

    def base(self) -> dict[str, Any]:
        """What decides what the model computes of a text, whatever its precision."""
        tokenizer = {} if self.tokenizer is None else {"tokenizer": tokenizer_of(self.tokenizer)}
        return {"weights": weights_of(self.source, self.model), **self._settings, **tokenizer}

    def identity(self, depth: int) -> dict[str, Any]:
        """What the trunk's states depend on: the caches' address."""
        layers = layouts.layers_of(self.model)[:depth]
        return {
            "embeddings": frozen_digest(self.model.get_input_embeddings()),
            "layers": [frozen_digest(layer) for layer in layers],
            "dtype": str(self.dtype),
            "type": self.model.config.model_type,
            "depth": depth,
            **({} if self.quantize == "none" else {"quantize": self.quantize}),
        }


def read_tokenizer(source: str | Path) -> Any:
    """The tokenizer in the folder or of the id ``source``; ModelError where its vocabulary is not there."""
    tokenizer = loading.load(AutoTokenizer, source, "tokenizer")
    # Without tokenizer.json or vocabulary files, transformers makes a tokenizer of special tokens alone, and every text
    # becomes nothing or [UNK]. Some count one or two more: T5's "▁", the mask of XLM-RoBERTa.
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 3:
        raise ModelError(
            f"the tokenizer of {str(source)!r} knows special tokens only: put its tokenizer.json or vocabulary files there"
        )
    return tokenizer


def checked_precision(quantize: str, embedding: bool, config: PretrainedConfig, source: str | Path) -> str:
    """``model.quantize``, or what a quantised checkpoint brings; ConfigError where the two contradict."""
    stored = stream.stored_precision(config, source)
    if quantize == "none" and stored is None and embedding:
        raise ConfigError("model.quantize_embedding=true needs low-bit layers too: set model.quantize=int8 or nf4")
    if quantize != "none" and stored not in (None, quant.storage(quantize)):
        raise ConfigError(
            f"{str(source)!r} holds {stored} weights, not {quantize}: set model.quantize={stored}, or give float weights"
        )
    return stored if stored and quantize == "none" else quantize


def is_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are what a linear head makes of the last hidden states: no cap and no factor in the configuration,
    and the head is the model's own child, not the last layer of another one, as BERT's behind its transform."""
    settings, head = model.config.get_text_config().to_dict(), model.get_output_embeddings()
    changes = [value for name, value in settings.items() if "logit" in name and value not in (None, False, 1)]
    alone = any(child is head for child in model.children())
    return not changes and alone and isinstance(head, nn.Linear | quant.FrozenLinear)
