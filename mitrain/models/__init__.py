"""Frozen backbones: the language model, the image encoders, and the trunk that is computed once."""

from typing import Any, Literal

from pydantic import field_validator

from mitrain.core.config import Section
from mitrain.models.quant import Precision
from mitrain.models.stream import Shard
from mitrain.models.text import TextBackbone
from mitrain.models.vision import VisionConfig, VisionEncoder

__all__ = ["ModelConfig", "Shard", "TextBackbone", "VisionConfig", "VisionEncoder"]


class ModelConfig(Section):
    """The frozen parts. ``llm_shape`` gives a configuration in place of weights, for ``--dry-run`` alone.

    ``vision`` is one encoder or a list; a bare name stands for its defaults. Several feed one infusion: their global
    features are concatenated; where ``adapter.modalities`` names as many, each is a modality of its own. ``device``:
    auto takes a GPU if there is one. ``dtype`` is what is computed in; ``quantize`` holds the matrices of the
    language model's layers in 8 or 4 bits (``int8-activations`` rounds their inputs too), ``quantize_embedding`` also
    the embedding, and a head tied to it, in int8.
    """

    llm: str
    llm_shape: dict[str, Any] | None = None
    vision: tuple[VisionConfig, ...]
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    quantize: Precision = "none"
    quantize_embedding: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("vision", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        return [{"name": item} if isinstance(item, str) else item for item in items]
