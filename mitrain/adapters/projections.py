"""The linear projections inside a transformer layer, told by the names that Hugging Face's models share."""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from torch import nn

from mitrain import hf
from mitrain.errors import ModelError

Projection = Literal["q", "k", "v", "o", "mlp"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
NAMES: dict[str, Projection] = {
    **dict.fromkeys(("query", "q_proj", "q_lin"), "q"),
    **dict.fromkeys(("key", "k_proj", "k_lin"), "k"),
    **dict.fromkeys(("value", "v_proj", "v_lin"), "v"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "projection"), "o"),
    **dict.fromkeys(("fc1", "fc2", "lin1", "lin2", "gate_proj", "up_proj", "down_proj"), "mlp"),
}
CROSS = "crossattention"
ATTENTION_BLOCKS = ("attention", "self_attn", "attn", CROSS)


def kind_of(path: str) -> Projection | None:
    """What the projection at ``path`` inside a layer is; None for any other module."""
    *above, name = path.split(".")
    if name == "dense":
        return "o" if set(above) & set(ATTENTION_BLOCKS) else "mlp"
    return NAMES.get(name)


def projections(
    model: nn.Module, kinds: Sequence[Projection], layers: Sequence[int]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(owner, attribute, projection) of the asked ``kinds`` in the asked ``layers``; ModelError where a kind is missing."""
    stack = hf.decoder_layers(model)
    for index in layers:
        layer, seen = stack[index], set()
        for path, module in layer.named_modules():
            kind = kind_of(path) if hasattr(module, "in_features") else None
            if kind in kinds:
                seen.add(kind)
                owner, _, attribute = path.rpartition(".")
                yield layer.get_submodule(owner), attribute, module
        if missing := [kind for kind in kinds if kind not in seen]:
            raise ModelError(
                f"layer {index} of {type(model).__name__} has no projection {missing[0]} by a known name: leave it out of"
                " adapter.targets"
            )
