"""The settings of the task `retrieve`."""

from typing import Literal

from pydantic import Field

from mitrain.core.config import Section
from mitrain.core.user_code import FunctionName
from mitrain.tasks.template import template_with

Readout = Literal["last", "mean", "cls", "embeddings"]


class RetrieveConfig(Section, kind="task", name="retrieve"):
    """``modality``: the one that is found for a text, and for which texts are; left out, the first. ``partner``: another
    modality in place of the text, for which ``readout``, ``template`` and ``max_tokens`` mean nothing. ``readout``: the
    text's states, concatenated. ``dim``: of the common space. ``temperature``: at first; it is trained.
    ``matching``: weight of the matching loss, 0 for a dual encoder alone. ``rerank``: how many candidates of each query the
    matching head orders at evaluation. ``max_tokens``: longer texts lose their end. ``dropout``: of what the maps read.
    ``queue``: how many vectors of earlier steps are contrasted with too, made by a slow copy of what is trained, which
    follows it with ``momentum`` and softens the targets by ``distil``, linearly from 0 over ``ramp`` micro-batches;
    ``queue_start``: it is empty at first, or full of random vectors. ``start``: ``auto`` takes the projections and the
    matching head of a checkpoint that was trained for retrieval (BLIP) where they fit, so that training starts from what
    it can do; ``fresh`` never does. ``metric``: a score of the user's own, see `mitrain.core.user_code`."""

    modality: str = ""
    partner: str = "text"
    template: template_with("text") = "{text}"
    readout: tuple[Readout, ...] = Field(("last",), min_length=1)
    dim: int = Field(128, ge=2, le=1 << 16)
    temperature: float = Field(0.07, gt=0.01, lt=1)
    matching: float = Field(1.0, ge=0)
    rerank: int = Field(10, ge=0)
    max_tokens: int = Field(64, ge=1, le=1 << 20)
    dropout: float = Field(0.0, ge=0, lt=1)
    queue: int = Field(0, ge=0, le=1 << 24)
    momentum: float = Field(0.995, ge=0, lt=1)
    distil: float = Field(0.4, ge=0, lt=1)
    ramp: int = Field(0, ge=0)
    queue_start: Literal["empty", "random"] = "empty"
    start: Literal["auto", "fresh"] = "auto"
    metric: FunctionName | None = None
