"""The settings of conditional prompts and MoPE."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from mitrain.core.config import Section

CPT_THRESHOLD, MOPE_THRESHOLD = 0.05, 0.1
MOPE_NOISE = 1 / 16**2
ENCODER, TEXT = "encoder", "text"


class MoPEConfig(Section, kind="adapter", name="mope"):
    """Settings of conditional prompts (``router: cpt``, arXiv 2312.03734) and MoPE (``mope``, arXiv 2403.10568).

    Every default is the authors' release. The other encoder comes first, and its vector ψ is the condition; static
    prompts alone read nothing of it. A main model that predicts next tokens must not read its tokens' mean, which holds
    later ones. ``routing: top1`` has the gradient of the dense weights. Without ``standardize``, as released, nearly all
    of ψ is common to all samples, and one expert takes nearly everything from the start.

    ``feature`` and ``condition`` are of the states after the final norm; ``all`` averages tokens and prompts. ``auto``:
    ``all`` of a main encoder, the ``mean`` of a main text model, the first token as ψ, and the last token of a causal
    model; of an encoder without a CLS token ψ is the mean; in a run of a text encoder whose folder says how it was
    trained to make a sentence's vector (1_Pooling/config.json of sentence-transformers), ψ is made so. ``spread``: none,
    see `prompts.init_range_of`.
    """

    main: Literal["encoder", "text"] = ENCODER
    length: int = Field(6, ge=1, le=1024)
    experts: int = Field(4, ge=1, le=1024)
    static: bool = True
    dynamic: bool = True
    mapped: bool = True
    router: Literal["mope", "cpt"] = "mope"
    router_reads: Literal["both", "tokens", "condition"] = "both"
    tokens_width: int = Field(2, ge=1, le=65536)
    condition_width: int = Field(8, ge=1, le=65536)
    keys: Literal["frozen", "learned"] = "frozen"
    routing: Literal["dense", "top1"] = "dense"
    temperature: float = Field(0.1, gt=0)
    noise: float | None = Field(None, ge=0)
    standardize: bool = False
    importance: float = Field(0.01, ge=0)
    threshold: float | None = Field(None, ge=0)
    shared_router: bool = False
    other_length: int = Field(4, ge=0, le=1024)
    mapper_width: int | None = Field(None, ge=1, le=65536)
    mapper_norm: Literal["layer", "none"] = "layer"
    dropout: float = Field(0.1, ge=0, lt=1)
    stage_start: Literal["carried", "prompted"] = "carried"
    feature: Literal["auto", "all", "mean", "first", "last"] = "auto"
    condition: Literal["auto", "mean", "first", "last"] = "auto"
    spread: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "MoPEConfig":
        if not self.prompts_main and not self.other_length:
            raise ValueError("nothing is trained: switch static, dynamic or mapped on, or give other_length")
        if self.router == "cpt" and (self.router_reads == "tokens" or self.keys == "learned"):
            raise ValueError("router=cpt reads the condition alone and has no keys: set router=mope")
        if self.shared_router and (self.router != "cpt" or self.stage_start != "prompted" or not self.dynamic):
            raise ValueError(
                "shared_router=true is of conditional prompts: set router=cpt, stage_start=prompted, dynamic=true"
            )
        return self

    def with_pooling(self, pooling: Callable[[], str | None]) -> "MoPEConfig":
        """With ``condition`` written out where ``pooling()``, of the text model, says how its vector is made."""
        read_outs = {"cls": "first", "mean": "mean", "last": "last"}
        if self.other != TEXT or self.condition != "auto" or (how := read_outs.get(pooling() or "")) is None:
            return self
        return self.model_copy(update={"condition": how})

    @property
    def other(self) -> Literal["encoder", "text"]:
        """The complementary modality."""
        return TEXT if self.main == ENCODER else ENCODER

    @property
    def prompts_main(self) -> bool:
        return self.static or self.dynamic or self.mapped

    @property
    def prompt_tokens(self) -> int:
        """Tokens that a layer of the main encoder gets; with all three prompts 2l + 1."""
        return self.static_tokens + self.length * self.dynamic + self.mapped

    @property
    def static_tokens(self) -> int:
        return self.length * self.static

    @property
    def router_widths(self) -> tuple[int, int]:
        """Width of the query's part from the tokens and from ψ; a part that reads alone has the whole width."""
        whole = self.tokens_width + self.condition_width
        alone = {"tokens": (whole, 0), "condition": (0, whole)}
        return alone.get(self.router_reads, (self.tokens_width, self.condition_width))

    @property
    def noise_std(self) -> float:
        if self.noise is not None:
            return self.noise
        return 1 / self.experts**2 if self.router == "cpt" else MOPE_NOISE

    @property
    def gamma(self) -> float:
        if self.threshold is not None:
            return self.threshold
        return CPT_THRESHOLD if self.router == "cpt" else MOPE_THRESHOLD


@dataclass(frozen=True)
class Shape:
    """The widths of what is prompted: per prompted layer of the main encoder (``widths``), per stage, of the prompt
    that enters a main encoder of carried prompts (or 0), of ψ, and per prompted layer of the other encoder."""

    widths: tuple[int, ...]
    stage_widths: tuple[int, ...]
    entry: int
    condition: int
    others: tuple[int, ...]


def mapper_width(config: MoPEConfig, condition: int) -> int:
    """Between the mapper's two maps."""
    return config.mapper_width or max(1, condition // 2)
