"""What a model costs, by arithmetic alone: parameters, bytes per rank, activations and multiply-accumulates.

Nothing is built or downloaded: shapes come from a configuration mapping in Hugging Face's key names, so a plan for
LLaMA-2-7B takes microseconds. Units are in every name or docstring: parameters are counts, memory is bytes, compute is
multiply-accumulates (1 MAC = 2 FLOPs). Counts are exact for Llama- and Mistral-like decoders and for CLIP and DINOv2
vision transformers; for their kin (query norms, biases) they are close estimates.

Symbols: h hidden width, L layers, H query heads, G key/value heads, d head width, f feed-forward width, V vocabulary,
e width of an infused feature, n infused layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from mitrain.core.errors import ConfigError
from mitrain.models.layouts import LAYOUTS, LLAMA

FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SCALE_BYTES = 4  # one fp32 scale per row (int8) or per block (nf4)
NF4_BLOCK = 64
LOSS_MAPS = {"ce": 3, "bce": 2, "focal": 7, "dice": 2}


@dataclass(frozen=True)
class LlmShape:
    """A decoder language model; ``gated`` tells a feed-forward of three matrices (SwiGLU) from one of two."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    gated: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LlmShape":
        """From a Hugging Face configuration (``config.to_dict()``, config.json); ConfigError names a missing key."""
        hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
        return cls(
            hidden=hidden,
            layers=integer(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=integer(config, "num_key_value_heads", heads),
            head_dim=integer(config, "head_dim", hidden // heads),
            ffn=integer(config, "intermediate_size"),
            vocab=integer(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            gated=LAYOUTS.get(config.get("model_type"), LLAMA).gated,
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    @property
    def linear_per_layer(self) -> int:
        """Weights of one layer's projections: also its MACs per token, attention scores aside."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def rows_per_layer(self) -> int:
        """Output rows of one layer's projections (q, k, v, o, feed-forward)."""
        qkv = self.head_dim * (self.heads + 2 * self.kv_heads)
        return qkv + 2 * self.hidden + (2 if self.gated else 1) * self.ffn

    @property
    def biases_per_layer(self) -> int:
        qkvo = self.head_dim * (self.heads + 2 * self.kv_heads) + self.hidden
        mlp = (2 if self.gated else 1) * self.ffn + self.hidden
        return self.attention_bias * qkvo + self.mlp_bias * mlp

    @property
    def head(self) -> int:
        """Parameters of the language head that are not shared with the embedding."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        per_layer = self.linear_per_layer + self.biases_per_layer + 2 * self.hidden
        return self.vocab * self.hidden + self.layers * per_layer + self.hidden + self.head

    def split(self) -> "Split":
        """Its parameters by whether low-bit formats apply: the layers' projections, and everything else."""
        linear = self.layers * self.linear_per_layer
        return Split(linear, self.layers * self.rows_per_layer, self.parameters - linear)

    def macs(self, tokens: int, logit_tokens: int = 0, attention: bool = True) -> int:
        """MACs of one sample's forward pass over ``tokens`` tokens, the head applied to ``logit_tokens`` of them.

        ``attention`` counts the causal scores and their sums: 2 H d T (T + 1) / 2 per layer.
        """
        scores = self.heads * self.head_dim * tokens * (tokens + 1) if attention else 0
        return self.layers * (tokens * self.linear_per_layer + scores) + logit_tokens * self.vocab * self.hidden


@dataclass(frozen=True)
class VitShape:
    """A vision transformer; ``dinov2`` tells its extras (patch bias, mask token, layer scales) from CLIP's pre-norm."""

    width: int
    layers: int
    ffn: int
    image: int
    patch: int
    channels: int = 3
    projection: int = 0
    dinov2: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VitShape":
        """From a CLIP (whole or vision part) or DINOv2 configuration in Hugging Face's keys.

        Of CLIP the projected encoder is meant. ConfigError names a missing key or the model type that is neither.
        """
        config = config.get("vision_config", config)
        kind = config.get("model_type")
        if kind not in ("clip_vision_model", "dinov2"):
            raise ConfigError(f"model_type={kind!r} is no vision transformer whose cost is known: use CLIP or DINOv2")
        dinov2, width = kind == "dinov2", integer(config, "hidden_size")
        return cls(
            width=width,
            layers=integer(config, "num_hidden_layers"),
            ffn=width * integer(config, "mlp_ratio", 4) if dinov2 else integer(config, "intermediate_size"),
            image=integer(config, "image_size"),
            patch=integer(config, "patch_size"),
            channels=integer(config, "num_channels", 3),
            projection=0 if dinov2 else integer(config, "projection_dim"),
            dinov2=dinov2,
        )

    @property
    def linear_per_layer(self) -> int:
        """Weights of one layer's projections: also its MACs per token, attention scores aside."""
        return 4 * self.width**2 + 2 * self.width * self.ffn

    @property
    def parameters(self) -> int:
        biases, norms = 5 * self.width + self.ffn, 4 * self.width
        per_layer = self.linear_per_layer + biases + norms + (2 * self.width if self.dinov2 else 0)
        # CLS, position embeddings, last norm; then DINOv2's patch bias and mask token, or CLIP's first norm.
        rest = self.width * (1 + self.tokens(self.image) + 2 + 2) + self.patch_weights + self.width * self.projection
        return self.layers * per_layer + rest

    @property
    def patch_weights(self) -> int:
        return self.channels * self.patch**2 * self.width

    def tokens(self, side: int) -> int:
        """CLS and the patches of a square image of ``side`` pixels."""
        return 1 + (side // self.patch) ** 2

    def macs(self, side: int | None = None) -> int:
        """MACs of one image's forward pass, attention scores included, at ``side`` pixels (else the native size)."""
        tokens = self.tokens(side or self.image)
        layer = tokens * self.linear_per_layer + 2 * tokens**2 * self.width
        return self.layers * layer + (tokens - 1) * self.patch_weights + self.width * self.projection


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model configuration has {key}={value!r}: give a whole number of at least 1")
    return value


def film_decoder_activations(
    levels: Sequence[int],
    condition: int,
    *,
    grid: tuple[int, int],
    prefix_tokens: int = 1,
    dim: int = 64,
    heads: int = 4,
    ffn: int = 2048,
    film: str = "first",
    patch: int = 14,
    coords: bool = False,
) -> int:
    """Bytes per sample that autograd keeps of `mitrain.tasks.decoders.FilmDecoder` in fp32 under fused attention.

    Per token and level: the level itself; the input of q, k, v, these three, the attention's output and log-sums; the
    input, mean and root of both norms, the first one's output; the feed-forward's activation; a modulated level's
    tokens. Then the map, and both activations on the way to the logits.
    """
    area, half = max(1, patch // 4) ** 2, dim // 2
    patches = grid[0] * grid[1]
    tokens = prefix_tokens + patches
    films = len(levels) if film == "every" else 1
    per_token = sum(levels) + len(levels) * (8 * dim + heads + 4 + ffn) + films * dim + dim + (2 if coords else 0)
    return 4 * (tokens * per_token + films * dim + condition + patches * (dim + half * area))


def unet_decoder_activations(
    levels: Sequence[int], condition: int, *, sizes: Sequence[tuple[int, int]], width: int = 512
) -> int:
    """Bytes per sample that autograd keeps of `mitrain.tasks.decoders.UnetDecoder` in fp32, whose maps have ``sizes``.

    Per pixel of each map: what is concatenated, and both convolutions' outputs before and after their ReLU.
    """
    before = [condition] + [width] * (len(levels) - 1)
    channels = [b + level + 4 * width for b, level in zip(before, levels, strict=True)]
    return 4 * sum(h * w * c for (h, w), c in zip(sizes, channels, strict=True))


def mask_loss_activations(kind: str, pixels: int) -> int:
    """Bytes per sample that autograd keeps of `mitrain.tasks.masks.mask_loss` over ``pixels``: so many fp32 maps."""
    first, _, second = kind.partition("+")
    return 4 * pixels * (LOSS_MAPS[first] + (1 if second else 0))


@dataclass(frozen=True)
class Split:
    """Frozen parameters by format: ``linear`` weights in matrices of ``rows`` output rows in all, and the ``other``."""

    linear: int
    rows: int
    other: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what they hold."""

    frozen: int
    weights: int
    gradients: int
    optimizer: int
    activations: int = 0

    @property
    def total(self) -> int:
        return self.frozen + self.weights + self.gradients + self.optimizer + self.activations


def frozen_bytes(split: Split, precision: str, other: str = "bf16", stage: int = 0, world: int = 1) -> int:
    """Bytes per rank of frozen weights: whole on every rank up to ZeRO stage 2, 1/world at stage 3.

    Low-bit formats (`mitrain.models.quant`) hold the matrices, the rest stays in the float format ``other``. int8 has a step
    per row, nf4 one per block of 64 weights; the steps are sharded like the payload.
    """
    if precision == "int8":
        size = split.linear + SCALE_BYTES * split.rows + float_bytes(other) * split.other
    elif precision == "nf4":
        steps = SCALE_BYTES * ceil(split.linear / NF4_BLOCK)
        size = ceil(split.linear / 2) + steps + float_bytes(other) * split.other
    else:
        size = float_bytes(precision) * (split.linear + split.other)
    return share(size, check_stage(stage) == 3, world)


def training_memory(trainable: int, frozen: int = 0, precision: str = "fp32", stage: int = 0, world: int = 1) -> Memory:
    """Bytes per rank for ``trainable`` parameters under AdamW, beside ``frozen`` bytes from `frozen_bytes`.

    AdamW keeps two fp32 moments; weights trained in bf16 or fp16 also an fp32 master copy, and so does DeepSpeed from
    stage 1 on in any case. These are what ZeRO shards from stage 1 on (Rajbhandari et al., SC 2020). The trainable weights
    stay whole on every rank, and their gradients are whole until a step's end, at every stage (`engine.zero`).
    """
    size = float_bytes(precision) * trainable
    state = (8 if precision == "fp32" and not check_stage(stage) else 12) * trainable
    return Memory(frozen=frozen, weights=size, gradients=size, optimizer=share(state, stage >= 1, world))


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def encoder_shape(config: Mapping[str, Any]) -> LlmShape | None:
    """An encoder's, from its configuration; None for one of several stages, as Swin, whose layers differ."""
    hidden, layers, heads = (config.get(key) for key in SIZES)
    if not all(isinstance(value, int) for value in (hidden, layers, heads)):
        return None
    ffn = config.get("intermediate_size") or int(hidden * config.get("mlp_ratio", 4))
    return LlmShape(hidden, layers, heads, heads, hidden // heads, ffn, vocab=0, tied=True, gated=False)


def activation_bytes(
    llm: LlmShape,
    tokens: int,
    above: int,
    infused: int,
    *,
    precision: str = "fp32",
    checkpointed: bool = False,
    logit_tokens: int = 0,
) -> int:
    """Estimated bytes per sample that autograd keeps of the language model (within a tenth); linear in the batch.

    Only the ``above`` layers from the first infused one upwards keep anything, ``infused`` of them with MiT. Inputs
    of frozen projections are not kept. Per token a plain layer under fused attention keeps both norms' fp32 inputs
    and roots, q, k, v, the attention's output and fp32 log-sum, and three feed-forward activations (two if ungated).
    An infused one, with a gate per query, also the gate's two fp32 scalars per head and one per key/value head; its
    gated feed-forward keeps but two activations, since the product is computed again, and an ungated one a product
    more.
    With ``checkpointed`` each layer keeps its input alone, and one layer is whole while it is recomputed.
    Logits at ``logit_tokens`` positions cost their values, fp32 copy and log-probabilities.
    """
    if not 0 <= infused <= above <= llm.layers:
        raise ConfigError(f"{infused} infused of {above} upper layers do not fit into {llm.layers}: correct the list")
    size, queries, keys = float_bytes(precision), llm.heads * llm.head_dim, llm.kv_heads * llm.head_dim
    halves = 2 * queries + 2 * keys + (3 if llm.gated else 2) * llm.ffn
    plain = 2 * 4 * (llm.hidden + 1) + size * halves + 4 * llm.heads
    extra = 4 * (2 * llm.heads + llm.kv_heads) + size * (-llm.ffn if llm.gated else llm.ffn)
    if checkpointed:
        per_token = above * size * llm.hidden + (plain + extra if infused else plain if above else 0)
    else:
        per_token = above * plain + infused * extra
    return tokens * per_token + logit_tokens * llm.vocab * (size + 8)


def largest_batch(budget: int, fixed: int, per_sample: int) -> int:
    """Most samples whose ``per_sample`` bytes fit beside ``fixed`` bytes into ``budget`` bytes; 0 if none does."""
    if per_sample < 1:
        raise ConfigError(f"per_sample={per_sample} bytes is no size of a sample: give at least 1")
    return max(0, (budget - fixed) // per_sample)


def float_bytes(precision: str) -> int:
    if precision not in FLOAT_BYTES:
        raise ConfigError(f"precision {precision!r} is not known here: choose one of {', '.join(FLOAT_BYTES)}")
    return FLOAT_BYTES[precision]


def check_stage(stage: int) -> int:
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"ZeRO stage {stage!r} does not exist: choose 0, 1, 2 or 3")
    return stage


def share(size: int, sharded: bool, world: int) -> int:
    """One rank's part of ``size`` bytes, rounded up."""
    if world < 1:
        raise ConfigError(f"world={world} ranks are too few: give at least 1")
    return -(-size // world) if sharded else size
