"""The linear projections inside a transformer layer, told by the names that Hugging Face's models share."""

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from mitrain.core.errors import ModelError
from mitrain.models import loading

Projection = Literal["q", "k", "v", "o", "mlp"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
NAMES: dict[str, Projection] = {
    **dict.fromkeys(("query", "q_proj", "q_lin"), "q"),
    **dict.fromkeys(("key", "k_proj", "k_lin"), "k"),
    **dict.fromkeys(("value", "v_proj", "v_lin"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "projection"), "o"),
    **dict.fromkeys(("fc1", "fc2", "lin1", "lin2", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc"), "mlp"),
    **dict.fromkeys(("dense_h_to_4h", "dense_4h_to_h"), "mlp"),
}
FUSED = ("c_attn", "qkv_proj", "query_key_value", "qkv", "Wqkv")
"""Names of one projection that makes queries, keys and values."""
CROSS = "crossattention"
ATTENTION_BLOCKS = ("attention", "self_attn", "self_attention", "attn", CROSS)
log = logging.getLogger(__name__)


def kind_of(path: str) -> Projection | None:
    """What the projection at ``path`` inside a layer is; None for any other module."""
    *above, name = path.split(".")
    if name in ("dense", "c_proj"):
        return "o" if set(above) & set(ATTENTION_BLOCKS) else "mlp"
    return NAMES.get(name)


def kinds_of(path: str, module: nn.Module) -> set[str]:
    """What the ``module`` at ``path`` inside a layer is a projection of; of a fused one, all that it makes."""
    if not (hasattr(module, "in_features") or isinstance(module, Conv1D)):
        return set()
    if path.rpartition(".")[2] in FUSED:
        return {"q", "k", "v"}
    kind = kind_of(path)
    return {kind} if kind else set()


def projections(
    model: nn.Module, kinds: Sequence[Projection], layers: Sequence[int]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(owner, attribute, projection) of the asked ``kinds`` in the asked ``layers``; ModelError where a kind is missing.

    A projection that makes several kinds at once is given whole, and a line says so where not all of them were asked.
    """
    stack, more = loading.decoder_layers(model), set()
    for index in layers:
        layer, seen = stack[index], set()
        for path, module in layer.named_modules():
            makes = kinds_of(path, module)
            if makes & set(kinds):
                seen |= makes
                more |= {path} if makes - set(kinds) else set()
                owner, _, attribute = path.rpartition(".")
                yield layer.get_submodule(owner), attribute, module
        if missing := [kind for kind in kinds if kind not in seen]:
            raise ModelError(
                f"layer {index} of {type(model).__name__} has no projection {missing[0]} by a known name: leave it out of"
                " adapter.targets"
            )
    if more:
        log.warning(
            "%s makes queries, keys and values at once (%s): all of it is changed", type(model).__name__, min(more)
        )
