"""MiT's settings: presets for the paper's and the release's forms."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from mitrain.core.config import Section
from mitrain.methods.presets import filled
from mitrain.methods.selection import LayersSetting

RELEASED_LAYERS = [13, 17, 21, 25, 29]
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "released": {"layers": RELEASED_LAYERS, "gate": "sequence", "k_add": True, "init": "released"},
    "paper": {"gate": "token", "base": 0, "k_add": True, "init": "released"},
}


class MiTConfig(Section, kind="adapter", name="mit"):
    """Settings of MiT. A preset fills in what is not given:

        default   what folds, generates and starts as the frozen model: base 1, gate prefix, identity, no k_add
        released  the authors' code: base 1, gate sequence, k_add, PyTorch's init, and the layers of their README,
                  13-17-21-25-29-32, without its 32, which their 0-based counter never reaches in a 32-layer model
        paper     the equations: base 0, and Eq. 4's cosine read per token (the gate 'token'); the init is the
                  release's, as the paper's is not known

    ``modalities``: names and feature widths. A run's follow from its encoders: one, ``image``, of all their features, or
    as many as are named here, one of each encoder in order.

    ``gate``: σ(L + cos(V, v_add)), where the cosine sees all of the text (``sequence``: for pooled read-outs, not
    causal), the text so far (``prefix``), or the key itself (``token``: does not fold, slower); ``none`` is 1.
    ``cosine=false`` leaves σ(L). ``k_add`` trains nothing unless the gate is ``token``: softmax cancels it. ``terms``: the
    attention's maps multiply and add, or do one of the two alone (without v_add the cosine is 0); ``ffn``: whether the
    feed-forward's activation is multiplied. ``lora_rank``: of LoRA on queries and values of the same layers, 0 for none; it
    counts 2 and acts with or without features.
    """

    preset: Literal["default", "released", "paper"] = "default"
    modalities: dict[str, Annotated[int, Field(gt=0, le=1 << 20)]] = Field(default_factory=dict)
    layers: LayersSetting = "last third"
    gate: Literal["sequence", "prefix", "token", "none"] = "prefix"
    cosine: bool = True
    base: Literal[0, 1] = 1
    k_add: bool = False
    terms: Literal["both", "multiply", "add"] = "both"
    ffn: bool = True
    init: Literal["identity", "released"] = "identity"
    rank: Annotated[int, Field(gt=0, le=1 << 16)] | None = None
    lora_rank: int = Field(0, ge=0, le=1 << 16)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        return filled(values, PRESETS)

    @model_validator(mode="after")
    def _check_names(self) -> "MiTConfig":
        for name in self.modalities:
            if not name.isidentifier() or hasattr(nn.ModuleDict, name) or name in ("training", "infused"):
                raise ValueError(f"{name!r} cannot name a modality: take a plain word such as image")
        return self

    @model_validator(mode="after")
    def _check_terms(self) -> "MiTConfig":
        if self.terms == "add" and self.base == 0:
            raise ValueError("base=0 without multiplying maps leaves no keys: set base=1, or terms to both or multiply")
        if self.terms == "multiply" and self.k_add:
            raise ValueError("k_add adds to keys, which terms=multiply leaves out: set k_add=false or terms=both")
        return self

    @property
    def kernel_gate(self) -> str:
        return self.gate if self.gate == "none" or self.cosine else "head"
