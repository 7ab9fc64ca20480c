"""The prefix gate's running sums, kept inside Hugging Face's KV cache so that they live and move with it.

A ``GateHistory`` is appended to ``cache.layers`` behind the model's own layers, one per infused layer. Whatever the
generation loop does to the cache (reorder for beams, repeat, select, crop, reset, deepcopy) it does to every entry
of that list, and so to the sums. The sums of every past token are kept, not only the last: a few scalars per token
and head, so that a crop is exact even where a sliding window has already evicted the values.

Shapes: B batch, H query heads, G key/value heads, T tokens, d head width, M modalities.
"""

import torch
from mitrain_kernels.infused_attention import GateSums, prefix_sums
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from mitrain.core.errors import ModelError
from mitrain.methods.mit.condition import Condition

SUPPORTED = (DynamicLayer, DynamicSlidingWindowLayer)


class GateHistory(DummyLayer):
    """Prefix sums of one infused layer for every token in the cache: an entry of the cache without keys or values.

    A DummyLayer is what transformers itself puts where a layer stores no keys and values, so that masks and lengths
    are never asked of it.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.reset()

    def reset(self) -> None:
        self.sums: GateSums | None = None
        self.samples: Condition | None = None  # the features that the sums were made with, one row per row
        self.checked: Condition | None = None  # the binding that is known to say the same

    def continues(self, tokens: int, batch: int, condition: Condition) -> bool:
        """Whether the sums are those of exactly ``tokens`` tokens, ``batch`` rows and these features."""
        if self.sums is None or self.sums.count.shape != (batch, tokens):
            return False
        if self.checked is not condition and not self.samples.same_features(condition.for_batch(batch)):
            return False
        self.checked = condition
        return True

    def append(self, sums: GateSums, condition: Condition) -> None:
        """Continue with the sums of the next tokens."""
        if self.sums is None:
            self.samples, self.checked = condition.for_batch(len(sums.count)), condition
        else:
            sums = GateSums(*(torch.cat(pair, dim=-1) for pair in zip(self.sums, sums, strict=True)))
        self.sums = sums

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.sums is not None:
            self.sums = GateSums(*(x[..., : -abs(tokens_to_remove)] for x in self.sums))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.sums is not None:
            self.batch_select_indices(torch.arange(len(self.sums.count)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.sums is not None:
            dot, square, count = self.sums
            rows = indices.to(count.device)
            self.sums = GateSums(dot[:, rows], square[rows], count[rows])
            self.samples, self.checked = self.samples.rows(indices), None


def check_cache(cache: object) -> None:
    """ModelError unless ``cache`` grows token by token in full precision, as generate's default cache does."""
    if not isinstance(cache, DynamicCache):
        raise ModelError(f"{type(cache).__name__} cannot be used with infused layers: use DynamicCache, the default")
    kinds = {type(layer) for layer in cache.layers} | ({cache.layer_class_to_replicate} - {None})
    wrong = [kind.__name__ for kind in kinds if kind not in SUPPORTED and not issubclass(kind, DummyLayer)]
    if wrong:
        raise ModelError(f"a cache with {wrong[0]} cannot be used with infused layers: use DynamicCache")


def history(cache: Cache, layer_idx: int, depth: int) -> GateHistory:
    """The entry of layer ``layer_idx`` in ``cache``, made behind the ``depth`` layers of the model if need be."""
    while len(cache.layers) < depth:
        cache.layers.append(cache.layer_class_to_replicate())
    for entry in cache.layers[depth:]:
        if isinstance(entry, GateHistory) and entry.layer_idx == layer_idx:
            return entry
    cache.layers.append(GateHistory(layer_idx))
    return cache.layers[-1]


def continued_sums(
    entry: GateHistory, cache: Cache, v: Tensor, new: int, v_add: Tensor, padding: Tensor | None, condition: Condition
) -> GateSums | None:
    """The sums (T = 1) over the tokens before the ``new`` last ones of v (B, G, T, d); None if there are none.

    They are the entry's own where these fit, else summed again from the cached values, which a sliding window must
    not have evicted: ModelError.
    """
    past = cache.get_seq_length(entry.layer_idx) - new
    if entry.continues(past, len(v), condition):
        return entry.sums.last() if past else None
    entry.reset()
    if not past:
        return None
    if v.shape[2] != past + new:
        raise ModelError(
            f"the cache of layer {entry.layer_idx} was filled under other features and its window has dropped values "
            "that the gate needs: start again with an empty cache"
        )
    valid = None if padding is None else padding[:, :past].to(v.device)
    sums = prefix_sums(v[:, :, :past], v_add, valid)
    entry.append(sums, condition)
    return sums.last()
