"""No adapter: the frozen model as it is. The baseline that shows what a method adds."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.models import layouts


class NoneConfig(Section, kind="adapter", name="none"):
    """``modalities`` are accepted and ignored: the same features can be bound to every method."""

    modalities: dict[str, int] = {}


class NoAdapter(Adapter):
    """Trains nothing and changes nothing; the whole language model is trunk."""

    traits = Traits("none", checkpointing=True)  # nothing is kept for backward anyway

    def __init__(self, config: NoneConfig):
        super().__init__()
        self.config = config

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        depths = {name: len(layouts.layers_of(backbone)) for name, backbone in backbones.items()}
        return Attachment(depths, modalities=self.config.modalities, macs=0)
