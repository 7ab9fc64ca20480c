"""Infused attention behind Hugging Face's attention interface.

``register`` offers every base implementation (``sdpa``, ``eager``) once more as ``infused_sdpa``, ``infused_eager``.
Such a function is the base itself, except in a layer whose call carries an ``Infusion`` (put there by a hook). There
``infused_sdpa`` is the operator ``infused_attention``, and ``infused_eager`` is the model's own function on ``q ⊙ α``,
followed by ``o ⊙ γ + δ``. Keys, values, masks and the KV cache stay the model's own.

Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from mitrain_kernels.infused_attention import (
    GateSums,
    folded_coefficients,
    infused_attention,
    infused_keys_values,
    keep_dead,
)
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from mitrain.core.errors import ModelError
from mitrain.methods.mit.condition import Condition
from mitrain.methods.mit.gate_cache import GateHistory, continued_sums, history

BASES = ("sdpa", "eager")
PREFIX = "infused_"


class LayerMaps(NamedTuple):
    """What the modalities say to one layer: maps (M, B, H, d), head_logit (M, H), present (M, B) bool or None.

    ``base`` is 0 or 1, or (B,).
    """

    k_mul: Tensor
    v_mul: Tensor
    v_add: Tensor
    k_add: Tensor | None
    head_logit: Tensor
    present: Tensor | None
    base: int | Tensor


@dataclass
class Infusion:
    """One layer's part in one forward pass: travels from the hook of the attention module to its attention function.

    padding (B, T) bool, True for a token, over all tokens seen so far; ``depth`` is the number of decoder layers.
    """

    maps: LayerMaps
    gate: str
    condition: Condition
    padding: Tensor | None
    cache: Cache | None
    layer_idx: int
    depth: int
    backend: str = "auto"
    used: bool = False

    def history(self, v: Tensor, new: int) -> tuple[GateHistory | None, GateSums | None]:
        """The cache's entry for the gate, if there is one, and the sums before the ``new`` last tokens of v."""
        if self.gate != "prefix" or self.cache is None:
            return None, None
        entry = history(self.cache, self.layer_idx, self.depth)
        before = continued_sums(entry, self.cache, v, new, self.maps.v_add, self.padding, self.condition)
        return entry, before

    def valid(self, v: Tensor, tokens: int) -> Tensor | None:
        """(B, tokens) bool for the last ``tokens`` of all tokens seen so far."""
        return None if self.padding is None else self.padding[:, -tokens:].to(v.device)

    def coefficients(self, v: Tensor, new: int) -> tuple[Tensor, Tensor, Tensor]:
        """α, γ, δ (B, H, new or 1, d) for the ``new`` last tokens of v (B, G, T, d); the cache's sums move on."""
        entry, before = self.history(v, new)
        own = {name: value for name, value in self.maps._asdict().items() if name != "k_add"}
        gating = {"gate": self.gate, "key_padding": self.valid(v, new), "before": before}
        factors, sums = folded_coefficients(v[:, :, -new:], **own, **gating)
        if entry is not None:
            entry.append(sums, self.condition)
        return factors


def register() -> None:
    """Make the infused implementations known to transformers, masks included (without them padding is ignored)."""
    for base in BASES:
        AttentionInterface.register(PREFIX + base, partial(infused_forward, base))
        AttentionMaskInterface.register(PREFIX + base, AttentionMaskInterface()[base])


def infused_forward(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    infusion: Infusion | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The base attention, or infused attention; returns ((B, Tq, H, d), attention weights or None) as they do.

    query (B, H, Tq, d), key and value (B, G, Tk, d), attention_mask (B, 1, Tq, Tk): bool or additive.
    """
    attend = base_function(base, module)
    if infusion is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    check_call(infusion, query, value, kwargs)
    infusion.used = True
    if base == "sdpa":
        return by_operator(infusion, module, query, key, value, attention_mask, kwargs), None
    maps = infusion.maps
    # This gate differs from key to key, which does not fold: keys and values are infused for every query head.
    if infusion.gate == "token":
        key, value = infused_keys_values(key, value, **maps._asdict())
        return attend(Ungrouped(module), query, key, value, attention_mask, **kwargs)
    alpha, gamma, delta = infusion.coefficients(value, new=query.shape[2])
    output, weights = attend(module, query * alpha.to(query.dtype), key, value, attention_mask, **kwargs)
    # δ is added to every row, and a query that sees no key gives 0.
    if attention_mask is not None:
        delta = delta * rows_that_see(attention_mask)
    gamma, delta = (x.transpose(1, 2).to(output.dtype) for x in (gamma, delta))
    output = torch.addcmul(delta, output, gamma)
    # The softmax drops k_add, the same amount on all of a query's scores: it gets explicit zeros as its gradient.
    return keep_dead(output, maps.k_add), weights


def by_operator(
    infusion: Infusion,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """The operator's output (B, Tq, H, d); ``mask`` is what transformers makes for SDPA, bool or None."""
    entry, before = infusion.history(value, query.shape[2])
    causal = options.get("is_causal")
    try:
        output = infused_attention(
            query,
            key,
            value,
            **infusion.maps._asdict(),
            gate=infusion.gate,
            key_padding=infusion.valid(value, value.shape[2]),
            # ready-made by transformers, for backends that need one: not made again in every layer
            mask=mask,
            causal=module.is_causal if causal is None else causal,
            window=options.get("sliding_window"),
            scale=options.get("scaling"),
            state_in=before,
            return_state=entry is not None,
            backend=infusion.backend,
        )
    except ValueError as error:
        raise ModelError(f"layer {infusion.layer_idx}: {error} (in a configuration: kernels.backend=auto)") from None
    if entry is not None:
        output, sums = output
        entry.append(sums, infusion.condition)
    return output.transpose(1, 2).contiguous()


def base_function(base: str, module: nn.Module) -> Callable:
    """transformers' own function; ``eager`` is each model file's."""
    if base != "eager":
        return AttentionInterface()[base]
    return sys.modules[type(module).__module__].eager_attention_forward


def rows_that_see(mask: Tensor) -> Tensor:
    """(B, 1, Tq, 1) bool: whether a query sees any key under a bool or additive mask (B, 1, Tq, Tk)."""
    if mask.dtype == torch.bool:
        return mask.any(-1, keepdim=True)
    return mask.amax(-1, keepdim=True) > torch.finfo(mask.dtype).min


def check_call(infusion: Infusion, query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse, in one line, what would make the folded form wrong."""
    where = f"layer {infusion.layer_idx}"
    if kwargs.get("dropout"):
        raise ModelError(f"{where} drops attention probabilities, under which infusion does not fold: call model.eval()")
    if kwargs.get("s_aux") is not None:
        raise ModelError(f"{where} uses attention sinks, under which infusion does not fold: not supported")
    if kwargs.get("softcap") is not None and infusion.maps.k_add is not None and infusion.gate != "token":
        raise ModelError(f"{where} caps its attention scores, under which k_add does not fold: set adapter.k_add=false")
    maps = infusion.maps.v_add.shape
    if query.shape[:2] + query.shape[3:] != maps[1:] or value.shape[-1] != maps[-1]:
        raise ModelError(
            f"{where} attends with {tuple(query.shape)} queries and {tuple(value.shape)} values, but was announced as "
            f"(batch, heads, head width) {tuple(maps[1:])}: this model's layers are not supported"
        )


class Ungrouped:
    """An attention module as seen by an attention function that is handed one key/value head per query head."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
