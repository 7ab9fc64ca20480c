"""Trained parameters by arithmetic alone, from the equations: what the modules' own counts are held against."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from mitrain.methods.aurora.aurora import Aurora
from mitrain.methods.aurora.config import AuroraConfig, Part
from mitrain.methods.aurora.points import vector_counts
from mitrain.methods.mit.config import MiTConfig
from mitrain.methods.mit.decoder import LayerShape
from mitrain.methods.mit.maps import attention_maps
from mitrain.methods.mope.config import MoPEConfig, Shape, mapper_width
from mitrain.methods.pmf.pmf import LINKS, PMFConfig


def mit_layer_parameters(features: Sequence[int], llm: LayerShape, *, maps: int = 3, ffn: bool = True) -> int:
    """Parameters that MiT adds to one infused layer, summed over modalities of the given feature widths e.

        Σ_m [ a (e_m · H d + H d) + (e_m f + f) + H ]        a = 3 affine ``maps``, or 4 with the release's additive key map

    Every map has the width H d of the query heads, also with grouped keys and values.
    """
    width = llm.heads * llm.head_dim
    outputs = maps * width + (llm.ffn if ffn else 0)
    return sum((e + 1) * outputs + llm.heads for e in features)


def mit_layer_macs(features: Sequence[int], llm: LayerShape, *, maps: int = 3, ffn: bool = True) -> int:
    """MACs of one infused layer's maps, once per sample whatever its length: its weights without the biases."""
    outputs = maps * llm.heads * llm.head_dim + (llm.ffn if ffn else 0)
    return sum(e * outputs for e in features)


@dataclass(frozen=True)
class MiTCount:
    """Trainable parameters: of each infused layer, of what the layers share, and in all."""

    per_layer: int
    shared: int
    layers: int

    @property
    def total(self) -> int:
        return self.per_layer * self.layers + self.shared


def mit_parameters(config: MiTConfig, shape: LayerShape, layers: int) -> MiTCount:
    """Count without building anything; ``layers`` infused layers of equal ``shape``.

    A ``rank`` takes the place of every feature's width in the layers' maps (`mit_layer_parameters`); the
    layers share the projections to it.
    """
    widths = list(config.modalities.values())
    read = [config.rank or width for width in widths]
    maps = len(attention_maps(config.k_add, config.terms))
    per_layer = mit_layer_parameters(read, shape, maps=maps, ffn=config.ffn)
    return MiTCount(per_layer, sum(widths) * (config.rank or 0), layers)


@dataclass(frozen=True)
class MoPECount:
    """Trained parameters by part; frozen keys are not counted."""

    static: int
    experts: int
    entry: int
    router: int
    mapper: int
    mapper_stages: int
    others: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def mope_parameters(config: MoPEConfig, shape: Shape) -> MoPECount:
    """Count without building anything; one more expert costs l · Σ widths (and under ``cpt`` the router's row)."""
    tokens, length, hidden = sum(shape.widths), config.length, mapper_width(config, shape.condition)
    first = shape.condition * hidden + hidden + 2 * hidden * (config.mapper_norm == "layer")
    second = sum((hidden + 1) * width for width in shape.stage_widths)
    return MoPECount(
        static=length * tokens * config.static,
        experts=config.experts * length * tokens * config.dynamic,
        entry=config.prompt_tokens * shape.entry,
        router=router_count(config, shape.widths, shape.condition) * config.dynamic,
        mapper=first * config.mapped,
        mapper_stages=second * config.mapped,
        others=config.other_length * sum(shape.others),
    )


def router_count(config: MoPEConfig, widths: Sequence[int], condition: int) -> int:
    """Trained parameters of the routers of layers of these ``widths``."""
    if config.router == "cpt":
        return (len(widths) - (config.shared_router and len(widths) > 1)) * (condition + 1) * config.experts
    of_tokens, of_condition = config.router_widths
    keys = (of_tokens + of_condition) * config.experts * (config.keys == "learned")
    return sum((width + 1) * of_tokens + (condition + 1) * of_condition + keys for width in widths)


@dataclass(frozen=True)
class AuroraShape:
    """What the count depends on: the width of each set of factors that is used, the vectors p_n of each part, the
    fusion layers, how many of them are composed, and the text model's width."""

    widths: Mapping[str, int]
    vectors: Mapping[Part, int]
    fusion_layers: int
    composed: int
    text_width: int

    @classmethod
    def of(cls, adapter: Aurora) -> "AuroraShape":
        """Of an attached adapter."""
        fusion = adapter.fusion
        layers = 0 if fusion is None else fusion.layers
        composed = layers if fusion is not None and fusion.composed else 0
        return cls(adapter.modes.widths, vector_counts(adapter._points), layers, composed, adapter._widths[0])


def aurora_parameters(config: AuroraConfig, shape: AuroraShape) -> int:
    """2 d R + |core| for each set of factors, R for every p_n, 2 D for every pair of GQT, one factor for each composed
    cross-attention; |core| is R (CP) or R³ (dense)."""
    r = config.rank
    core = r if config.core == "cp" else r**3
    factors = sum(2 * width * r + core for width in shape.widths.values())
    gqt = 2 * shape.text_width * config.gqt_pairs * shape.fusion_layers
    return factors + r * sum(shape.vectors.values()) + gqt + shape.composed


def pmf_parameters(config: PMFConfig, text: int, image: int) -> int:
    """Trainable parameters, without the head: arithmetic alone. ``text``, ``image``: the encoders' widths."""
    widths = {"text": text, "encoder": image}
    inner, total = config.inner_width(widths), 0
    for source, target in (tuple(widths[side] for side in LINKS[link]) for link in config.links):
        total += config.fusion_context * target
        if not config.query_prompts:
            continue
        total += (config.query_prompts + config.query_context) * source
        total += source * target + target if config.map == "linear" else (source + target + 1) * inner + target
    return config.fusion_layers * total


def film_decoder_parameters(
    levels: Sequence[int],
    condition: int,
    *,
    dim: int = 64,
    ffn: int = 2048,
    film: str = "first",
    classes: int = 2,
    patch: int = 14,
    coords: bool = False,
) -> int:
    """Parameters of `mitrain.tasks.decoders.FilmDecoder` with the same arguments."""
    reduce = sum(width * dim + dim for width in levels)
    films = (len(levels) if film == "every" else 1) * 2 * (condition * dim + dim)
    layer = 4 * (dim * dim + dim) + 2 * dim * ffn + ffn + dim + 4 * dim
    area, half = max(1, patch // 4) ** 2, dim // 2
    enlarge = 9 * dim * dim + dim + dim * half * area + half + half * classes * area + classes
    return reduce + films + len(levels) * layer + enlarge + (2 * dim if coords else 0)
