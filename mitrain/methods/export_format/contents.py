"""mitrain.json, field by field; what is missing, unknown or of another type is refused."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mitrain.models.shapes import LARGEST, SMALLEST, BaseShape, EncoderShape, Strict


class FileSum(Strict):
    """A file's SHA-256 and its length in bytes."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Parameters(Strict):
    """How many numbers are trained, and how many are frozen in the language model beside them (none where it is trained
    whole)."""

    trainable: int = Field(ge=0)
    frozen: int = Field(ge=0)


PROMPTS_KEPT = 256
"""Of how many different training prompts the answers are exported; of more, none."""
ANSWERS_KEPT = 1000
"""Of how many answers of at most `ANSWER_LENGTH` characters a prompt's are exported; where it has more, none of them."""
ANSWER_LENGTH = 1000

Answer = Annotated[str, Field(max_length=ANSWER_LENGTH)]
Answers = Annotated[list[Answer], Field(max_length=ANSWERS_KEPT)]


class PreprocessPart(Strict):
    """How an image becomes an encoder's input: ``size`` in pixels, mean and standard deviation of each channel."""

    size: int = Field(ge=14, le=4096)
    mean: list[Annotated[float, Field(ge=-LARGEST, le=LARGEST)]] = Field(min_length=3, max_length=3)
    std: list[Annotated[float, Field(ge=SMALLEST, le=LARGEST)]] = Field(min_length=3, max_length=3)
    resize: Literal["squash", "pad"]


class EncoderPart(Strict):
    """One encoder; its name and settings are in the run's configuration, in the same order. ``preprocess``: of an image
    encoder."""

    shape: EncoderShape
    preprocess: PreprocessPart | None


class RunPart(Strict):
    """What a run adds to its adapter.

    ``config``: its configuration without the language model's name and device. ``answers``: the answers that training
    samples had, by prompt (none: not kept). ``step``: of the checkpoint, ``best`` whether it was the best on val.
    ``metrics``: by split, of that step.
    """

    config: dict[str, Any]
    encoders: list[EncoderPart]
    answers: Annotated[dict[str, Answers], Field(max_length=PROMPTS_KEPT)] | None
    step: int = Field(ge=0)
    best: bool
    metrics: dict[str, dict[str, Any]]


class Contents(Strict):
    """mitrain.json. ``adapter``: the method's name and settings. ``tensors``: mitrain.safetensors.

    ``frozen``: digests of the models that it was trained on, by name (`Model.base`). ``peft``: the files beside it that
    PEFT reads, of a method that PEFT can load. ``checksum`` covers everything but
    itself and ``base_model_name_or_path``, which may be edited.
    """

    format: int
    mitrain_version: str
    base_model_name_or_path: str
    base: BaseShape
    adapter: dict[str, Any]
    parameters: Parameters
    tensors: FileSum
    run: RunPart | None
    frozen: dict[str, str] | None = None
    peft: dict[str, FileSum] | None = None
    checksum: str

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {name: value for name, value in values.items() if name not in ("frozen", "peft") or value is not None}
