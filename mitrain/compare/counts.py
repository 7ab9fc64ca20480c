"""Counted cells: parameters and multiply-accumulates of a configuration, on models without weights."""

from typing import Any

from pydantic import Field

from mitrain.compare.measures import parameters
from mitrain.core import config
from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import costs
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
    numbers["backbone_parameters"] = numbers["frozen_parameters"] - language_head(model)
    numbers["parts"] = parts(model)
    return numbers | (macs(model, asked) if asked.macs else {})


def parts(model: Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.adapter.named_parameters():
        kind = ".".join(word for word in name.split(".") if not word.isdigit())
        counts[kind] = counts.get(kind, 0) + parameter.numel() * parameter.requires_grad
    return counts


def language_head(model: Model) -> int:
    """Parameters of a head that is not the embedding again."""
    get = getattr(model.text.model, "get_output_embeddings", lambda: None)
    head, inputs = get(), model.text.model.get_input_embeddings()
    return head.weight.numel() if head is not None and head.weight is not inputs.weight else 0


def macs(model: Model, asked: CountOptions) -> dict[str, Any]:
    """Multiply-accumulates of one sample's forward pass, without a language head.

    text_macs      the language model over the text alone
    adapter_macs   what the method adds to a sample (`Attachment.macs`)
    vision_macs    the image encoder
    method_macs    the three together: what the configuration takes
    prepended_macs vision, and the language model over the text behind one token for each of the picture's patches
    """
    llm = costs.LlmShape.from_config(model.text.model.config.get_text_config().to_dict())
    views = [costs.VitShape.from_config(encoder.model.config.to_dict()) for encoder in model.encoders.values()]
    if not views:
        raise ConfigError("model.encoders is empty: give an encoder whose multiply-accumulates can be counted")
    vision = sum(view.macs(asked.side) for view in views)
    patches = sum(view.tokens(asked.side or view.image) - 1 for view in views)
    text = llm.macs(asked.text_tokens)
    adapter = model.adapter.attachment.macs
    if adapter is None:
        name = model.adapter.traits.name
        raise ModelError(f"the multiply-accumulates of {name} are not known: leave out count.macs")
    prepended = llm.macs(asked.text_tokens + patches)
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
