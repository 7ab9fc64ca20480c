"""No adapter: the frozen model as it is. The baseline that shows what a method adds."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.methods.base import Adapter
from mitrain.models import layouts
from mitrain.models.costs import LlmShape


class NoneConfig(Section, kind="adapter", name="none"):
    """``modalities`` are accepted and ignored: the same features can be bound to every method."""

    modalities: dict[str, int] = {}


class NoAdapter(Adapter):
    """Trains nothing and changes nothing; the whole language model is trunk."""

    method: ClassVar[str] = "none"

    def __init__(self, config: NoneConfig):
        super().__init__()
        self.config = config
        self._depth: dict[str, int] = {}

    def install(self, backbones: Mapping[str, PreTrainedModel]) -> None:
        self._depth = {name: len(layouts.layers_of(backbone)) for name, backbone in backbones.items()}

    def set_checkpointing(self, enabled: bool) -> None:
        """Nothing is kept for backward anyway."""

    def macs(self, llm: LlmShape) -> int:
        return 0

    def first_layer(self, name: str) -> int:
        return self._depth[name]

    @property
    def feature_widths(self) -> Mapping[str, int]:
        return self.config.modalities
