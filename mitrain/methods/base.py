"""The adapter protocol: what a method must offer so that training, evaluation and checkpoints need not know it.

An adapter is a module of trainable parameters that attaches to frozen Hugging Face models through hooks, wrapped
modules and the attention interface, and takes itself off again without a trace. How the methods meet it:

    MiT     binds one vector per modality; maps in the infused layers turn it into factors of keys, values and FFN.
    PMF     attaches to two encoders: ``encode`` runs the fusion layers of both in turn, each once for its query
            prompts and once for the fusion; ``first_layer`` = depth - L_f.
    MoPE    attaches to two encoders: every layer of the main one gets prompts that depend on the other's
            vector, with weights from a router; ``extra_loss`` is the importance loss; ``first_layer`` = 0.
    Aurora  a forward hook of every tuned projection adds U diag(λ ⊙ p_n) Vᵀ x, with U and V shared by all backbones;
            needs no features; ``merge`` adds the same matrices to the frozen weights.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ModelError
from mitrain.methods import export_format
from mitrain.methods.refusals import guard_saving
from mitrain.models import costs, frozen, quant
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch


class Adapter(nn.Module, ABC):
    """Trainable parameters beside frozen backbones.

    While attached, the adapter is a submodule of each backbone under its method's name, so an optimizer built from a
    backbone's trainable parameters gets the adapter's and no others; ``state_dict()`` holds adapter tensors only.
    The backbones stay without gradients and in eval mode, also after ``backbone.train()``.
    """

    method: ClassVar[str]
    """Its name: of its settings (``Section``), in METHODS and of the submodule that it is while attached; no points."""
    backbones: ClassVar[tuple[str, ...]] = ("text",)
    """The backbones that it attaches to; with ``image``, ``encode`` is given the states that enter its changed layers."""
    runs_layers: ClassVar[bool] = False
    """It runs the layers itself: ``encode`` is always given the states that enter ``first_layer`` of each backbone."""
    wraps_text_model: ClassVar[bool] = False
    """`encode` goes through a model around the text model, which the language head knows nothing of."""
    text_depends_on_input: ClassVar[bool] = False
    """A reading's ``text`` depends on the picture; ``picture.infused=False`` leaves it out while the rest stays."""
    passes: ClassVar[int] = 1
    """How often `encode` runs each changed layer, for estimates of memory."""
    feature_widths: Mapping[str, int] = {}
    """The modalities that `conditioned` gives to passes of the text model alone, each with its feature width e."""
    config: Section
    """The settings, all that its constructor takes; an export writes them and makes the adapter from them again."""

    def __init__(self) -> None:
        super().__init__()
        self._backbones: dict[str, PreTrainedModel] = {}
        self._undo = contextlib.ExitStack()
        self.backend = "auto"

    # What a method implements

    @abstractmethod
    def install(self, backbones: Mapping[str, PreTrainedModel]) -> None:
        """Check the backbones, create parameters, put hooks in place; register each undoing step with ``undo``.

        Called again after `detach`, perhaps with other backbones: existing parameters are kept, and must fit. Also called
        on models without storage (meta device), where the tensors get the same names and shapes.
        """

    @abstractmethod
    def first_layer(self, name: str) -> int:
        """The lowest layer of backbone ``name`` that the adapter changes; those below are a frozen function."""

    def encode(self, words: TextBatch | None, picture: ModalityInputs | None) -> Outputs:
        """One pass of the adapted backbones over texts, pictures or (row by row) both.

        With one of them alone it is what a dual encoder needs: that modality by itself.
        """
        text = None
        if words is not None:
            with self.conditioned(picture):
                text = frozen.last_hidden(self._backbones["text"], words)
        return Outputs(text, words and words.mask, picture and picture.feature)

    @contextlib.contextmanager
    def conditioned(self, inputs: ModalityInputs | None, copies: int = 1) -> Iterator[None]:
        """Inside, passes of the text model alone (``generate`` with ``copies`` rows per sample) are given ``inputs`` where
        the method reads them there; nothing to do for one that only `encode` gives them to."""
        yield

    def image_width(self, feature: int) -> int:
        """Width of a reading's ``image``; ``feature``: e of the frozen encoders' global feature."""
        return feature

    @property
    def joint_width(self) -> int:
        """Width of a reading's ``joint``; 0: it has none."""
        return 0

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the backbones compute what they would without the adapter: nothing to do where only `encode` differs."""
        yield

    def set_checkpointing(self, enabled: bool) -> None:
        """Keep only the inputs of the changed layers for backward and compute the rest again."""
        if enabled:
            raise ModelError(f"{self.method} has no activation checkpointing: switch it off")

    def extra_loss(self) -> tuple[Tensor, Tensor] | None:
        """A regulariser of the last forward pass as (sum, count), or None; training adds its mean to the loss's mean."""
        return None

    def merge(self) -> None:
        """Fold the adapter into the frozen weights, where its effect does not depend on the input."""
        raise ModelError(f"{self.method} depends on each sample's features and cannot be merged: keep it attached")

    def peft_files(self, tensors: Mapping[str, Tensor], base: str) -> export_format.PeftFiles | None:
        """The state dict ``tensors`` as PEFT saves it, trained on the model ``base``; None where PEFT cannot load it."""
        return None

    # What the dry run and comparisons ask, for numbers that no method owes

    def infused_parameters(self) -> Mapping[int, int]:
        """Parameters by the index of each text layer that infused attention runs in; empty for other methods."""
        return {}

    def usage(self) -> Mapping[str, float]:
        """What a row of a comparison is to keep of the last training pass, as how evenly experts were used."""
        return {}

    def macs(self, llm: costs.LlmShape) -> int:
        """Multiply-accumulates that the method adds to a sample's forward pass on a text model of shape ``llm``."""
        raise ModelError(f"the multiply-accumulates of {self.method} are not known: leave out count.macs")

    # What every method inherits

    def attach(
        self, backbones: Mapping[str, PreTrainedModel], checkpoint: bool = False, backend: str = "auto"
    ) -> "Adapter":
        """Freeze ``backbones`` and install the adapter in them; on an error they are left as they were.

        checkpoint: activation checkpointing of the layers that the adapter changes. backend: see ``KernelConfig``.
        Raises ModelError where one of ``backbones`` is missing, has such an adapter or is computed wrongly here.
        """
        if self._backbones:
            raise ModelError(f"this {self.method} adapter is attached already: call detach() first")
        self.check_free(backbones)
        if missing := [name for name in self.backbones if name not in backbones]:
            raise ModelError(
                f"{self.method} attaches to {' and '.join(self.backbones)} models: give it the {missing[0]} model"
            )
        for backbone in backbones.values():
            quant.check_four_bit(backbone)
        self.backend = backend
        try:
            for backbone in backbones.values():
                self._freeze(backbone)
            self.install(backbones)
            self.set_checkpointing(checkpoint)
            self._backbones = dict(backbones)
            for backbone in backbones.values():
                backbone.add_module(self.method, self)
                self.undo(delattr, backbone, self.method)
                for model in {backbone, getattr(backbone, "base_model", backbone)}:
                    self.undo(guard_saving(model, self.method))
            self.train(self.training)
        except BaseException:
            self.detach()
            raise
        return self

    def check_free(self, backbones: Mapping[str, PreTrainedModel]) -> None:
        """ModelError where one of the ``backbones`` has such an adapter."""
        for name, backbone in backbones.items():
            if hasattr(backbone, self.method):
                raise ModelError(
                    f"the {name} model has a {self.method} adapter (or attribute) already: detach it first"
                )

    def detach(self) -> None:
        """Leave the backbones exactly as found; the adapter keeps its parameters and can be attached again."""
        self._undo.close()
        self._backbones = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._backbones:  # a copy's hooks would be the original's
            raise ModelError(
                f"a model with a {self.method} adapter attached cannot be copied or pickled: call the adapter's detach()"
                " first, and attach again (or mitrain.load_adapter) on the copy"
            )
        return super().__reduce_ex__(protocol)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the attached adapter to a new ``folder``, whole or not at all; PEFT's own files too where `peft_files` can.

        `mitrain.load_adapter` attaches it to another model of the same shape. A run is exported with its head and
        encoders by ``mitrain export``.
        """
        if "text" not in self._backbones:
            raise ModelError(f"this {self.method} adapter is not attached to a language model: call attach() first")
        model = self._backbones["text"]
        settings = {"name": self.method, **self.config.to_dict()}
        base = export_format.without_home(model.name_or_path)
        fields = export_format.method_fields(settings, model.config, base, export_format.count([self], model))
        tensors = self.state_dict()
        peft = self.peft_files(tensors, base)
        return export_format.publish(folder, fields, {"adapter": tensors}, export_format.model_card, peft)

    def undo(self, function: Any, *args: Any) -> None:
        """Call ``function(*args)`` on ``detach``, the latest first."""
        self._undo.callback(function, *args)

    def train(self, mode: bool = True) -> "Adapter":
        """Set the adapter's own mode; the frozen backbones around it go back to eval mode."""
        super().train(mode)
        own = set(self.modules())
        for backbone in self._backbones.values():
            for module in backbone.modules():
                if module not in own:
                    module.training = False
        return self

    def _freeze(self, backbone: PreTrainedModel) -> None:
        trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        training = [module for module in backbone.modules() if module.training]
        self.undo(_restore, trainable, training)
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False


def _restore(trainable: list[nn.Parameter], training: list[nn.Module]) -> None:
    for parameter in trainable:
        parameter.requires_grad_(True)
    for module in training:
        module.training = True
