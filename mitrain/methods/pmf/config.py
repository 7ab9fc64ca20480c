"""PMF's settings."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from mitrain.core.config import Section

LINKS = {"text_to_image": ("text", "encoder"), "image_to_text": ("encoder", "text")}
"""Link -> (source, target): the target's tokens get prompts that sum up the source's. The links are named as saved tensors
are, whatever the encoder reads."""


class PMFConfig(Section, kind="adapter", name="pmf"):
    """Settings of PMF; the defaults are the release's.

    ``fusion_layers``: L_f, how many of each encoder's last layers are paired. ``query_prompts``, ``query_context``,
    ``fusion_context``: M_q, M_c, M_p; those of 0 do not exist. Without query prompts nothing is asked: there is no map and
    no query context either, only the fusion context of each encoder by itself. ``map``: the map between
    the encoders, Linear - ReLU - Linear over ``map_width`` (none: half the wider encoder's width) or one linear layer.
    ``direction``: who is told of whom; an encoder that is told nothing stays as it is, without prompts of its own.
    """

    fusion_layers: int = Field(2, ge=1)
    query_prompts: int = Field(4, ge=0, le=1024)
    query_context: int = Field(4, ge=0, le=1024)
    fusion_context: int = Field(4, ge=0, le=1024)
    map: Literal["nonlinear", "linear"] = "nonlinear"
    map_width: int | None = Field(None, ge=1, le=65536)
    direction: Literal["both", "text-to-encoder", "encoder-to-text"] = "both"

    @model_validator(mode="after")
    def _check_width(self) -> "PMFConfig":
        if self.map == "linear" and self.map_width is not None:
            raise ValueError("map_width is the inner width of the nonlinear map: leave it out with map=linear")
        if not self.query_prompts and not self.fusion_context:
            raise ValueError("nothing is trained: give query_prompts, fusion_context or both")
        return self

    @property
    def links(self) -> list[str]:
        """The names of LINKS that exist."""
        return [name for name, sides in LINKS.items() if self.direction in ("both", "-to-".join(sides))]

    def inner_width(self, widths: Mapping[str, int]) -> int:
        """m of the nonlinear map."""
        return self.map_width or max(widths.values()) // 2
