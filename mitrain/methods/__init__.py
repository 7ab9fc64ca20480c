"""The methods by name: the one place where a new method is added, by an import and its class in ``METHODS``."""

from collections.abc import Callable, Mapping

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError
from mitrain.methods.aurora.aurora import Aurora
from mitrain.methods.base import Adapter
from mitrain.methods.full import Full
from mitrain.methods.gated_xattn import GatedCrossAttention
from mitrain.methods.mit.mit import MiT
from mitrain.methods.mope.mope import MoPE
from mitrain.methods.none import NoAdapter
from mitrain.methods.peft import IA3, LoRA, Prefix, Prompt
from mitrain.methods.pmf.pmf import PMF
from mitrain.methods.uniadapter import UniAdapter
from mitrain.methods.visual_prefix import VisualPrefix
from mitrain.methods.vlora import VLoRA

METHODS: dict[str, type[Adapter]] = {
    kind.traits.name: kind
    for kind in (
        *(MiT, PMF, MoPE, Aurora, NoAdapter, LoRA, IA3, Prompt, Prefix, VisualPrefix, Full),
        *(GatedCrossAttention, VLoRA, UniAdapter),
    )
}


def build(config: Section, widths: Mapping[str, int] | None = None) -> Adapter:
    """The adapter that the section ``config`` describes, not attached yet.

    ``widths``: each modality's feature width where the encoders decide it; ConfigError if the section says otherwise.
    """
    if config.section_name not in METHODS:
        raise ConfigError(
            f"{type(config).__name__} ({config.section_name!r}) is of no name in METHODS of mitrain/methods/__init__.py:"
            f" choose one of {sorted(METHODS)}, or add its method there under that name"
        )
    given = dict(getattr(config, "modalities", {}))
    if widths is not None and given not in ({}, dict(widths)):
        raise ConfigError(
            f"adapter.modalities={given}, but the encoders give {dict(widths)}: leave adapter.modalities out, or name"
            " the modalities of model.encoders with their widths"
        )
    if widths is not None and "modalities" in type(config).model_fields:
        config = config.model_copy(update={"modalities": dict(widths)})
    return METHODS[config.section_name](config)


def calibrate(adapter: Adapter, run: Callable[[], None]) -> None:
    """Before the first step: let ``adapter`` take statistics from ``run()``: passes over training samples, no gradients."""
    adapter._calibrate(run)
