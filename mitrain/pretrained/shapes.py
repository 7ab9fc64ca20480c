"""Fingerprints of frozen models: the numbers that decide whether an adapter fits them."""

from typing import ClassVar

from pydantic import ConfigDict, Field
from transformers import PretrainedConfig

from mitrain.config import Section
from mitrain.errors import ModelError

SMALLEST, LARGEST = 1e-3, 1e3
"""Bounds of the standard deviations, and of the means' size, by which channels of values from 0 to 1 are normalised."""


class Strict(Section):
    """A section of a file that only mitrain writes: no number is read from a text, no text from a number."""

    model_config = ConfigDict(strict=True)
    largest: ClassVar[int] = 1 << 63


class BaseShape(Strict):
    """A language model. ``vocabulary``: rows of the embedding; ``ffn_width`` is 0 where the configuration names none."""

    model_type: str
    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    ffn_width: int = Field(ge=0)
    vocabulary: int = Field(ge=1)


class EncoderShape(Strict):
    """An image encoder. ``width``: of its global feature; ``channels``: of its patch tokens; ``patch`` in pixels."""

    model_type: str
    width: int = Field(ge=1)
    layers: int = Field(ge=0)
    channels: int | None
    patch: int | None


def base_shape(config: PretrainedConfig) -> BaseShape:
    """The fingerprint of the language model that ``config`` describes."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return BaseShape(
        model_type=text.model_type,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        ffn_width=getattr(text, "intermediate_size", None) or 0,
        vocabulary=text.vocab_size,
    )


def require_same(saved: Strict, here: Strict, what: str, mend: str) -> None:
    """ModelError where two fingerprints differ, with every difference; ``what`` is the model, ``mend`` what to do."""
    one, two = saved.model_dump(), here.model_dump()
    wrong = [f"{name} {str(one[name])[:40]}, here {two[name]}" for name in one if one[name] != two[name]]
    if wrong:
        raise ModelError(f"{what} does not match what the adapter was trained on: {'; '.join(wrong)}: {mend}")
