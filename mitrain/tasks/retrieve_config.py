"""The settings of the task `retrieve`."""

from typing import Literal

from pydantic import Field

from mitrain.core.config import Section
from mitrain.core.user_code import FunctionName
from mitrain.tasks.template import template_with

Readout = Literal["last", "mean", "cls", "embeddings"]


class RetrieveConfig(Section, kind="task", name="retrieve"):
    """``partner``: with one, ``readout``, ``template`` and ``max_tokens`` mean nothing. ``queue``: its vectors are made by
    a slow copy of what is trained, which follows it with ``momentum`` and softens the targets by ``distil``. ``start``:
    ``auto`` takes a checkpoint's projections and matching head where they fit, so that training starts from what it can
    do, ``ridge`` the best linear map of files to partners, which leaves the partners as they are."""

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
    start: Literal["auto", "fresh", "ridge"] = "auto"
    metric: FunctionName | None = None
