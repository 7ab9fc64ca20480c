"""Frozen backbones: the language model, the encoders of other modalities, and the trunk that is computed once."""

from typing import Any, Literal

from pydantic import SerializeAsAny, field_validator

from mitrain.core import config
from mitrain.core.config import Section
from mitrain.core.errors import ConfigError
from mitrain.models.encoders import ENCODERS, Encoder, EncoderConfig, ImageConfig, ImageEncoder, encoder_of
from mitrain.models.encoders.config import modalities_of, read_encoders
from mitrain.models.quant import Precision
from mitrain.models.stream import Shard
from mitrain.models.text import TextBackbone


class ModelConfig(Section):
    """The frozen parts. ``encoders`` maps the name of each modality to the encoder that makes its feature; a bare name of
    a model stands for its defaults, and encoders that join another's modality are concatenated to it (`EncoderConfig`)."""

    llm: str
    llm_shape: dict[str, Any] | None = None
    encoders: dict[str, SerializeAsAny[EncoderConfig]]
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    quantize: Precision = "none"
    quantize_embedding: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("encoders", mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        try:
            return read_encoders(value, {name: section for name, (section, _) in ENCODERS.items()})
        except ConfigError as error:
            raise config.Told(error) from None

    @property
    def modalities(self) -> dict[str, list[str]]:
        """The modalities, each with the names of the encoders that make it."""
        return modalities_of(self.encoders)
