"""Counted cells: parameters and multiply-accumulates of a configuration, on models without weights."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from mitrain.compare.measures import parameters
from mitrain.core import config
from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.models.layouts import LAYOUTS, LLAMA
from mitrain.training.build import Model, build
from mitrain.training.schema import RunConfig


class CountOptions(Section):
    """``macs``: also multiply-accumulates of one sample, for a decoder language model and a vision transformer, where
    ``text_tokens`` is the text's length and ``side`` the picture's in pixels (none: the encoder's own).
    """

    macs: bool = False
    text_tokens: int = Field(43, ge=1)
    side: int | None = Field(None, ge=14)


def count(run_config: RunConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a row of kind ``count``.

    ``backbone_parameters``: of the frozen models without the language model's head, against which papers give shares.
    ``parts``: the adapter's, by their names without numbers of layers.
    """
    asked = config.parse(CountOptions, options, "count")
    model = build(run_config, empty=True)
    numbers = parameters(model)
    head = getattr(model.text.model, "get_output_embeddings", lambda: None)()
    tied = head is None or head.weight is model.text.model.get_input_embeddings().weight
    numbers["backbone_parameters"] = numbers["frozen_parameters"] - (0 if tied else head.weight.numel())
    numbers["parts"] = parts(model)
    return numbers | (macs(model, asked) if asked.macs else {})


def parts(model: Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.adapter.named_parameters():
        kind = ".".join(word for word in name.split(".") if not word.isdigit())
        counts[kind] = counts.get(kind, 0) + parameter.numel() * parameter.requires_grad
    return counts


def macs(model: Model, asked: CountOptions) -> dict[str, Any]:
    """Multiply-accumulates of one sample's forward pass, without a language head.

    text_macs      the language model over the text alone
    adapter_macs   what the method adds to a sample (`Attachment.macs`)
    vision_macs    the image encoder
    method_macs    the three together: what the configuration takes
    prepended_macs vision, and the language model over the text behind one token for each of the picture's patches
    """
    llm = model.text.model.config.get_text_config().to_dict()
    views = [vit_macs(encoder.model.config.to_dict(), asked.side) for encoder in model.encoders.values()]
    if not views:
        raise ConfigError("model.encoders is empty: give an encoder whose multiply-accumulates can be counted")
    vision, patches = (sum(part) for part in zip(*views, strict=True))
    text = llm_macs(llm, asked.text_tokens)
    adapter = model.adapter.attachment.macs
    if adapter is None:
        name = model.adapter.traits.name
        raise ModelError(f"the multiply-accumulates of {name} are not known: leave out count.macs")
    prepended = llm_macs(llm, asked.text_tokens + patches)
    return {
        "text_tokens": asked.text_tokens,
        "image_tokens": patches,
        "text_macs": text,
        "adapter_macs": adapter,
        "vision_macs": vision,
        "language_macs": text + adapter,
        "method_macs": text + adapter + vision,
        "prepended_language_macs": prepended,
        "prepended_macs": prepended + vision,
    }


def llm_macs(config: Mapping[str, Any], tokens: int) -> int:
    """Of one text of ``tokens`` tokens through a decoder as Llama or Mistral, from its configuration.

    In each layer every projection once a token, and the causal scores and their sums: 2 H d T (T + 1) / 2.
    """
    hidden, heads, ffn = (integer(config, key) for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    width = integer(config, "head_dim", hidden // heads)
    matrices = 3 if LAYOUTS.get(config.get("model_type"), LLAMA).gated else 2
    weights = 2 * hidden * width * (heads + integer(config, "num_key_value_heads", heads)) + matrices * hidden * ffn
    return integer(config, "num_hidden_layers") * (tokens * weights + heads * width * tokens * (tokens + 1))


def vit_macs(config: Mapping[str, Any], side: int | None = None) -> tuple[int, int]:
    """(of one picture of ``side`` pixels, or the native size, through CLIP's projected encoder or DINOv2; its patches)."""
    config = config.get("vision_config", config)
    kind = config.get("model_type")
    if kind not in ("clip_vision_model", "dinov2"):
        raise ConfigError(f"model_type={kind!r} is no vision transformer whose cost is known: use CLIP or DINOv2")
    width, patch = integer(config, "hidden_size"), integer(config, "patch_size")
    clip = kind == "clip_vision_model"
    ffn = integer(config, "intermediate_size") if clip else width * integer(config, "mlp_ratio", 4)
    patches = ((side or integer(config, "image_size")) // patch) ** 2
    tokens = 1 + patches
    layer = tokens * (4 * width**2 + 2 * width * ffn) + 2 * tokens**2 * width
    ends = patches * integer(config, "num_channels", 3) * patch**2 * width
    ends += width * integer(config, "projection_dim") if clip else 0
    return integer(config, "num_hidden_layers") * layer + ends, patches


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model configuration has {key}={value!r}: give a whole number of at least 1")
    return value
