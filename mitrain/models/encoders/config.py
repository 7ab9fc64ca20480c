"""The encoders of a run, by name: ``model.encoders`` maps NAME to a section of the kind of file that the encoder takes."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from mitrain.core import config
from mitrain.core.config import Section
from mitrain.core.errors import ConfigError

ALIASES = {"speech": "audio", "sound": "audio", "frames": "video"}
NAME = r"[a-z][a-z0-9_]{0,40}"
RESERVED = frozenset(
    "id object kind text prompt answer answers candidates references label labels target expression size segmentation"
    " present captions caption samples pictures last mean cls embeddings joint files predicted generated probabilities"
    " scores rank mask_share log_likelihood".split()
)
"""Names of a sample's other fields, of read-outs and of what is predicted, recorded or printed beside the inputs."""


class EncoderConfig(Section):
    """What every frozen encoder has. Without ``joins`` it makes a modality of its own."""

    name: str
    takes: str
    input: str = Field("", pattern=rf"^({NAME})?$")
    joins: str = Field("", pattern=rf"^({NAME})?$")
    layer: int | None = Field(None, ge=1)
    shape: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """The encoder in messages."""
        return f"the {self.takes} encoder {self.name!r}"


def read_encoders(value: Any, kinds: Mapping[str, type[EncoderConfig]]) -> dict[str, EncoderConfig]:
    """The sections of ``model.encoders``, of the ``kinds`` of files that there are; a bare name of a model stands for its
    defaults."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            "model.encoders must be a mapping from a modality to its encoder, as image: {name: dinov2-vits14}, not"
            f" {repr(value)[:60]}"
        )
    sections: dict[str, EncoderConfig] = {}
    for name, values in value.items():
        sections[name] = read_encoder(str(name), values, sections, kinds)
    return sections


def read_encoder(
    name: str, values: Any, before: Mapping[str, EncoderConfig], kinds: Mapping[str, type[EncoderConfig]]
) -> EncoderConfig:
    where = f"model.encoders.{name}"
    if isinstance(values, EncoderConfig):
        return values
    values = {"name": values} if isinstance(values, str) else values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a section or the name of a model, not {repr(values)[:60]}")
    check_name(name, where)
    joined = values.get("joins") or ""
    if not isinstance(joined, str):
        raise ConfigError(f"{where}.joins={joined!r}: give the name of an encoder")
    if joined and (joined not in before or before[joined].joins):
        raise ConfigError(
            f"{where}.joins={joined!r}: name an encoder that stands before it and joins none itself:"
            f" {', '.join(each for each, section in before.items() if not section.joins) or 'there is none'}"
        )
    known = before[joined].takes if joined else ALIASES.get(name, name)
    takes = values.get("takes", known)
    if not isinstance(takes, str) or takes not in kinds:
        raise ConfigError(
            f"{where}.takes={takes!r}: say what kind of file the encoder takes, one of {', '.join(sorted(kinds))}"
        )
    reads = before[joined].input if joined else values.get("input") or name
    if joined and values.get("input", reads) not in ("", reads):
        raise ConfigError(f"{where}.input: an encoder that joins {joined!r} reads its input {reads!r}: leave it out")
    check_name(str(reads), f"{where}.input")
    return config.parse(kinds[takes], {**values, "takes": takes, "input": reads}, where)


def check_name(name: str, where: str) -> None:
    if not re.fullmatch(NAME, name) or name in RESERVED:
        raise ConfigError(
            f"{where}: {name[:60]!r} cannot name a modality or an input: take lower-case letters, digits and _, and none of"
            f" {', '.join(sorted(RESERVED))}"
        )


def modalities_of(encoders: Mapping[str, EncoderConfig]) -> dict[str, list[str]]:
    """Each modality with the names of the encoders whose features make it, side by side; one not infused has none."""
    modalities: dict[str, list[str]] = {}
    for name, section in encoders.items():
        if getattr(section, "infused", True):
            modalities.setdefault(section.joins or name, []).append(name)
    return modalities


def inputs_of(encoders: Mapping[str, EncoderConfig]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(section.input for section in encoders.values()))
