"""Aurora's settings: presets for the paper's and the release's forms."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mitrain.core.config import Section
from mitrain.methods.presets import filled
from mitrain.models.layouts import PROJECTIONS, Projection

Part = Literal["encoder", "text", "fusion"]
PARTS: tuple[Part, ...] = ("encoder", "text", "fusion")
ATTENTION: tuple[Projection, ...] = ("q", "k", "v", "o")
COMPOSED_LAYERS = 2
"""Fusion layers that are composed where the text model has no cross-attention and the settings name no number."""
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"rank": 64, "core": "cp", "gqt": "gate", "ice": True},
    "released": {
        "rank": 32,
        "core": "dense",
        "encoder": PROJECTIONS,
        "text": ("q", "k", "v"),
        "fusion": ("q", "k", "v"),
        "gqt": "residual",
        "ice": True,
    },
}


class AuroraConfig(Section, kind="adapter", name="aurora"):
    """Settings of Aurora. A preset fills in what is not given:

        default   CP modes of rank 64 over q, k, v and o of all three parts; GQT as a residual; no ICE, so that a
                  prediction does not depend on its neighbours in the batch
        paper     the equations, with the gate as its authors explain it, and ICE
        released  the authors' code: a dense core of rank 32, the encoder MLP, no output projections of the text model;
                  its ICE without the label leak

    ``joint: auto`` is the first token where the cross-attention is the model's own, the last of a causal model, else the
    mean.
    """

    preset: Literal["default", "paper", "released"] = "default"
    rank: int = Field(64, ge=1, le=4096)
    core: Literal["cp", "dense"] = "cp"
    factors: Literal["shared", "per-modality"] = "shared"
    encoder: tuple[Projection, ...] = ATTENTION
    text: tuple[Projection, ...] = ATTENTION
    fusion: tuple[Literal["q", "k", "v", "o"], ...] = ATTENTION
    dropout: float = Field(0.1, ge=0, lt=1)
    gqt: Literal["residual", "gate", "none"] = "residual"
    ice: bool = False
    fusion_layers: int | None = Field(None, ge=0)
    fusion_gate: Literal["scalar", "channels"] = "scalar"
    fusion_scale: float | None = None
    joint_token: int | Literal["auto", "none"] = "auto"
    joint: Literal["auto", "cls", "mean", "last"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        return filled(values, PRESETS)

    @model_validator(mode="after")
    def _check_tuned(self) -> "AuroraConfig":
        for part in PARTS:
            names = getattr(self, part)
            if len(set(names)) < len(names):
                raise ValueError(f"{part}={list(names)} names a projection twice: name each once")
        if not (self.encoder or self.text or (self.fusion and self.fusion_layers != 0)):
            raise ValueError("no projection is tuned: name some of q, k, v, o, mlp in encoder, text or fusion")
        return self

    @property
    def sets(self) -> tuple[str, ...]:
        return ("shared",) if self.factors == "shared" else PARTS

    def set_of(self, part: Part) -> str:
        return "shared" if self.factors == "shared" else part

    @property
    def gqt_pairs(self) -> int:
        """Pairs (γ, β) in each fusion layer: of the self- and the cross-attention's output, or of the former alone."""
        return {"residual": 2, "gate": 1, "none": 0}[self.gqt]
