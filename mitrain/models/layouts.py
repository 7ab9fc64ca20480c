"""Where Hugging Face's models keep what mitrain runs, changes or reads: the one place that knows the names.

`LAYOUTS` has a row for each family whose names are its own. The list of layers needs no name: it is the one ``ModuleList``
whose length is ``config.num_hidden_layers``. A family without a row is read by the names that the rows have between them, so
that every decoder of the Llama kind is served; encoders are served by their rows alone, since they add things between
their layers that no signature shows: see `Layout.checked`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from mitrain.core.errors import ModelError

Projection = Literal["q", "k", "v", "o", "mlp"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
CROSS = "crossattention"
"""A text layer's attention to another model's tokens, as BLIP's."""
ROTARY = "rotary_emb"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """The names of one family.

    where: ``attention`` = the block in a layer, with ``q``, ``k``, ``v`` and ``o`` in it (``qkv``: one projection that
    makes three; ``thirds``: it gives queries, keys and values in this order); ``mlp`` = the feed-forward's projections in
    a layer, the activation enters the last; ``norms`` = what follows the last layer; ``class_token`` = the parameter, if
    any, and ``class_tokens`` = how many of the first are read out; ``class_norm`` = the norm is for the class token alone;
    ``beside`` = the norm before attention (``pre``) or behind it, where a cross-attention can be composed from the block;
    ``kin`` = the layer's children, by which families without a row are known to be composed alike; ``gated`` = the feed-
    forward has three matrices; ``checked`` = an encoder whose layers are tested, one after another, to be the whole model.
    """

    attention: str
    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    qkv: str = ""
    mlp: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    class_token: str = ""
    class_tokens: int = 1
    class_norm: bool = False
    beside: str = ""
    pre: bool = True
    kin: frozenset[str] = frozenset()
    thirds: bool = False
    gated: bool = True
    checked: bool = False


SPLIT = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
LLAMA = Layout(
    "self_attn",
    **SPLIT,
    o="o_proj",
    mlp=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    norms=("norm",),
    beside="input_layernorm",
    kin=frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}),
)
BERT = Layout(
    "attention",
    **{"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"},
    mlp=("intermediate.dense", "output.dense"),
    beside="output.LayerNorm",
    pre=False,
    gated=False,
    checked=True,
)
SEEN = {"gated": False, "checked": True}
VIT = Layout(
    "attention", **SPLIT, o="o_proj", mlp=("mlp.fc1", "mlp.fc2"), norms=("layernorm",), class_token="cls_token", **SEEN
)
SIGLIP = Layout("self_attn", **SPLIT, o="out_proj", mlp=VIT.mlp, norms=("post_layernorm",), **SEEN)
# CLIP normalises nothing but the class token after its last layer.
CLIP = Layout(**{**vars(SIGLIP), "class_token": "class_embedding", "class_norm": True})
NEOX = Layout(
    "attention",
    qkv="query_key_value",
    o="dense",
    mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    norms=("final_layer_norm",),
    gated=False,
)
LAYOUTS: dict[str, Layout] = {
    "llama": LLAMA,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
    "distilbert": Layout("attention", "q_lin", "k_lin", "v_lin", "out_lin", mlp=("ffn.lin1", "ffn.lin2"), **SEEN),
    "modernbert": Layout("attn", qkv="Wqkv", norms=("final_norm",), checked=True),
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers"), VIT),
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "whisper": Layout("self_attn", **SPLIT, o="out_proj", mlp=("fc1", "fc2"), norms=("layer_norm",), **SEEN),
    "audio-spectrogram-transformer": Layout(**{**vars(VIT), "class_tokens": 2}),
    **dict.fromkeys(
        ("wav2vec2", "hubert"),
        Layout(
            "attention",
            **SPLIT,
            o="out_proj",
            mlp=("feed_forward.intermediate_dense", "feed_forward.output_dense"),
            norms=("layer_norm",),
            **SEEN,
        ),
    ),
    "blip_vision_model": Layout(
        "self_attn",
        qkv="qkv",
        thirds=True,
        o="projection",
        mlp=VIT.mlp,
        norms=("post_layernorm",),
        class_token="class_embedding",
        **SEEN,
    ),
    "blip_text_model": BERT,
    "gpt2": Layout("attn", qkv="c_attn", o="c_proj", mlp=("mlp.c_fc", "mlp.c_proj"), norms=("ln_f",), gated=False),
    "gptj": Layout("attn", **SPLIT, o="out_proj", mlp=("mlp.fc_in", "mlp.fc_out"), norms=("ln_f",), gated=False),
    "gpt_neox": NEOX,
    "bloom": Layout(
        "self_attention", qkv="query_key_value", o="dense", mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), gated=False
    ),
    "phi": Layout("self_attn", **SPLIT, o="dense", mlp=VIT.mlp, norms=("final_layernorm",), gated=False),
    "phi3": Layout("self_attn", qkv="qkv_proj", o="o_proj", mlp=("mlp.gate_up_proj", "mlp.down_proj"), norms=("norm",)),
    "lfm2": Layout("self_attn", **SPLIT, o="out_proj", mlp=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")),
}
ENCODERS = tuple(name for name, layout in LAYOUTS.items() if layout.checked)


def _once(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


ROWS = tuple(LAYOUTS.values())
ATTENTIONS = _once(row.attention for row in ROWS)
LEAVES: dict[str, Projection] = {
    getattr(row, kind).rpartition(".")[2]: kind for row in ROWS for kind in PROJECTIONS[:4] if getattr(row, kind)
}
FUSED = _once(row.qkv for row in ROWS)
THIRDS = _once(row.qkv for row in ROWS if row.thirds)
MLP = _once(path.rpartition(".")[2] for row in ROWS for path in row.mlp)
BLOCKS = (*_once(row.mlp[-1].rpartition(".")[0] for row in ROWS if row.mlp), "")
LAST = _once(row.mlp[-1].rpartition(".")[2] for row in ROWS if row.mlp)
NORMS = _once(name for row in ROWS for name in row.norms)
CLASS_TOKENS = _once(row.class_token for row in ROWS)
CACHES = ("cache", "past_key_values")  # the argument that takes a KV cache, from transformers 5.24 and before it


def layer_lists(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every list of as many modules as the model has layers: (the module that holds it, its name there)."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(config, "num_hidden_layers", None)
    return [
        (owner, name)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]


def layer_owner(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of transformer layers, and the attribute's name."""
    stacks = layer_lists(model)
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no list of as many transformer layers as its configuration says: give a"
            " transformer, such as Llama, BERT or ViT"
        )
    with_attention = (stack for stack in stacks if attention_of(getattr(*stack)[0]) is not None)
    return next(with_attention, stacks[0])  # wav2vec 2.0 may have as many convolutions


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The transformer layers, bottom first."""
    owner, name = layer_owner(model)
    return getattr(owner, name)


def attention_of(layer: nn.Module) -> nn.Module | None:
    return next((getattr(layer, name) for name in ATTENTIONS if hasattr(layer, name)), None)


def feed_forward_blocks(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that may hold the last feed-forward projection, by their names in ``layer``; '' is the layer itself."""
    for name in BLOCKS:
        block = getattr(layer, name, None) if name else layer
        if block is not None:
            yield name, block


def kind_of(path: str) -> Projection | None:
    """What the projection at ``path`` inside a layer is; None for any other module."""
    *above, name = path.split(".")
    if name in LEAVES and name in MLP:  # 'dense' is an output in an attention and a feed-forward's elsewhere
        return LEAVES[name] if set(above) & {*ATTENTIONS, CROSS} else "mlp"
    return LEAVES.get(name) or ("mlp" if name in MLP else None)


def makes(path: str) -> tuple[Projection, ...]:
    """All that the projection at ``path`` inside a layer gives."""
    if path.rpartition(".")[2] in FUSED:
        return PROJECTIONS[:3]
    kind = kind_of(path)
    return (kind,) if kind else ()


def linear_projections(layer: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Projection, ...]]]:
    """(path, module, what it gives) of the projections of ``layer`` that are known by name."""
    for path, module in layer.named_modules():
        if (hasattr(module, "in_features") or isinstance(module, Conv1D)) and (kinds := makes(path)):
            yield path, module, kinds


def require(kinds: Sequence[Projection], seen: set[str], model: nn.Module, index: int, setting: str) -> None:
    """ModelError where one of the ``kinds`` that ``setting`` asks of layer ``index`` was not ``seen`` there."""
    if missing := [kind for kind in kinds if kind not in seen]:
        raise ModelError(
            f"layer {index} of {type(model).__name__} has no projection {missing[0]} by a known name: leave it out of"
            f" {setting}"
        )


def projections(
    model: nn.Module, kinds: Sequence[Projection], layers: Sequence[int]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(owner, attribute, projection) of the asked ``kinds`` in the asked ``layers``; ModelError where a kind is missing.

    A projection that makes several kinds at once is given whole, and a line says so where not all of them were asked.
    """
    modules, more = layers_of(model), set()
    for index in layers:
        layer, seen = modules[index], set()
        for path, module, given in linear_projections(layer):
            if set(given) & set(kinds):
                seen |= set(given)
                more |= {path} if set(given) - set(kinds) else set()
                owner, _, attribute = path.rpartition(".")
                yield layer.get_submodule(owner), attribute, module
        require(kinds, seen, model, index, "adapter.targets")
    if more:
        log.warning("%s makes queries, keys and values at once (%s): all of it is changed", type(model).__name__, min(more))
