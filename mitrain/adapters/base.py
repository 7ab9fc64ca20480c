"""The adapter protocol: what a method must offer so that training, evaluation and checkpoints need not know it.

An adapter is a module of trainable parameters that attaches to frozen Hugging Face models through hooks, wrapped
modules and the attention interface, and takes itself off again without a trace. How the methods meet it:

    MiT     binds one vector per modality; maps in the infused layers turn it into factors of keys, values and FFN.
    PMF     attaches to two encoders and walks: ``read`` runs the fusion layers of both in turn, each once for its query
            prompts and once for the fusion; ``first_layer`` = depth - L_f.
    MoPE    attaches to two encoders and walks: every layer of the main one gets prompts that depend on the other's
            vector, with weights from a router; ``extra_loss`` is the importance loss; ``first_layer`` = 0.
    Aurora  a forward hook of every tuned projection adds U diag(λ ⊙ p_n) Vᵀ x, with U and V shared by all backbones;
            needs no features; ``merge`` adds the same matrices to the frozen weights.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain import costs, pretrained, quant, trunk
from mitrain.adapters.condition import Condition, Feature, make_condition
from mitrain.adapters.refusals import guard_saving
from mitrain.config import Section
from mitrain.errors import ModelError
from mitrain.reading import Picture, Reading, Words


class Adapter(nn.Module, ABC):
    """Trainable parameters beside frozen backbones.

    While attached, the adapter is a submodule of each backbone under its method's name, so an optimizer built from a
    backbone's trainable parameters gets the adapter's and no others; ``state_dict()`` holds adapter tensors only.
    The backbones stay without gradients and in eval mode, also after ``backbone.train()``.
    """

    method: ClassVar[str]
    """Its name: of its settings (``Section``), in METHODS and of the submodule that it is while attached; no points."""
    places: ClassVar[tuple[str, ...]] = ("text",)
    """The backbones that it attaches to; with ``image``, ``read`` is given the states that enter its changed layers."""
    walks: ClassVar[bool] = False
    """It runs the layers itself: ``read`` is always given the states that enter ``first_layer`` of each backbone."""
    wraps: ClassVar[bool] = False
    """`read` goes through a model around the text model, which the language head knows nothing of."""
    fuses: ClassVar[bool] = False
    """A reading's ``text`` depends on the picture; ``picture.infused=False`` leaves it out while the rest stays."""
    passes: ClassVar[int] = 1
    """How often `read` runs each changed layer, for estimates of memory."""
    takes_infused: ClassVar[bool] = True
    config: Section
    """The settings, all that its constructor takes; an export writes them and makes the adapter from them again."""

    def __init__(self) -> None:
        super().__init__()
        self._backbones: dict[str, PreTrainedModel] = {}
        self._undo = contextlib.ExitStack()
        self._bound: dict[int, list[Condition | None]] = {}  # by thread: several may run the model at a time
        self._keywords: dict[int, Condition | None] = {}
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

    @property
    @abstractmethod
    def feature_widths(self) -> Mapping[str, int]:
        """The modalities that ``bind`` takes, each with its feature width e."""

    def read(self, words: Words | None, picture: Picture | None) -> Reading:
        """One pass of the adapted backbones over texts, pictures or (row by row) both.

        With one of them alone it is what a dual encoder needs: that modality by itself.
        """
        text = None
        if words is not None:
            shown = picture is not None and picture.infused
            with self.bind(self.modalities_of(picture.feature if shown else None)):
                text = trunk.last_hidden(self._backbones["text"], words)
        return Reading(text, words and words.mask, picture and picture.feature)

    def modalities_of(self, feature: Tensor | None) -> dict[str, Feature]:
        """What `bind` takes for the image encoders' features side by side, (B, e): as many of the columns as each modality
        of `feature_widths` is wide, in order. Empty without a feature, or for a method that reads none."""
        widths = self.feature_widths
        if feature is None or not widths:
            return {}
        if sum(widths.values()) != feature.shape[-1]:
            raise ModelError(
                f"the pictures' features are {feature.shape[-1]} wide, but the adapter's modalities are {dict(widths)}: give"
                " features of their widths side by side"
            )
        return dict(zip(widths, feature.split(list(widths.values()), -1), strict=True))

    def image_width(self, feature: int) -> int:
        """Width of a reading's ``image``; ``feature``: e of the frozen encoders' global feature."""
        return feature

    @property
    def joint_width(self) -> int:
        """Width of a reading's ``joint``; 0: it has none."""
        return 0

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the backbones compute what they would without the adapter: nothing to do where only `read` differs."""
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

    def peft_files(self, tensors: Mapping[str, Tensor], base: str) -> pretrained.PeftFiles | None:
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
        Raises ModelError where one of ``places`` is missing, or a backbone has such an adapter or is computed wrongly here.
        """
        if self._backbones:
            raise ModelError(f"this {self.method} adapter is attached already: call detach() first")
        self.check_free(backbones)
        if missing := [name for name in self.places if name not in backbones]:
            raise ModelError(
                f"{self.method} attaches to {' and '.join(self.places)} models: give it the {missing[0]} model"
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
                take = backbone.register_forward_pre_hook(self._take_keyword, prepend=True, with_kwargs=True)
                self.undo(take.remove)
                self.undo(backbone.register_forward_hook(self._drop_keyword, always_call=True).remove)
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
        self._keywords.clear()

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
        base = pretrained.without_home(model.name_or_path)
        fields = pretrained.method_fields(settings, model.config, base, pretrained.count([self], model))
        tensors = self.state_dict()
        peft = self.peft_files(tensors, base)
        return pretrained.publish(folder, fields, {"adapter": tensors}, pretrained.model_card, peft)

    def undo(self, function: Any, *args: Any) -> None:
        """Call ``function(*args)`` on ``detach``, the latest first."""
        self._undo.callback(function, *args)

    @contextlib.contextmanager
    def bind(self, features: Mapping[str, Feature], copies: int | None = 1) -> Iterator["Adapter"]:
        """The features of the samples in the forward passes (or ``generate``) inside; they are dropped at the end.

        features: name -> (B, e), or ((B, e), (B,) bool mask of the samples that have it), or None for a missing
        modality. copies: rows per sample, for ``generate`` its num_beams or num_return_sequences; None: as many as
        the batch asks for. They are those of the thread that binds them. Raises ModelError where they don't fit the
        adapter or, inside, the batch.
        """
        if not self._backbones:
            raise ModelError(f"this {self.method} adapter is not attached, so features have no effect: call attach()")
        own, condition = threading.get_ident(), make_condition(features, self.feature_widths, copies)
        outer = self._bound.get(own, [])
        self._bound[own] = [*outer, condition]
        try:
            yield self
        finally:
            if outer:
                self._bound[own] = outer
            else:
                del self._bound[own]

    @property
    def condition(self) -> Condition | None:
        """The features of the running forward pass: the keyword ``infused=`` of the call, else the innermost bind.

        ModelError in a thread that has neither while another thread holds a binding: it may be meant for this one or not.
        """
        own = threading.get_ident()
        if own in self._keywords:
            return self._keywords[own]
        if own in self._bound:
            return self._bound[own][-1]
        if self._bound:
            raise ModelError(
                "features are bound in another thread than the one that runs the model: call bind() in the thread of the"
                " forward pass (or generate), or give infused= with the call"
            )
        return None

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

    def _take_keyword(self, backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "infused" in kwargs:
            own = threading.get_ident()
            self._keywords[own] = None
            self._keywords[own] = make_condition(kwargs.pop("infused"), self.feature_widths)
        return args, kwargs

    def _drop_keyword(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self._keywords.pop(threading.get_ident(), None)


def _restore(trainable: list[nn.Parameter], training: list[nn.Module]) -> None:
    for parameter in trainable:
        parameter.requires_grad_(True)
    for module in training:
        module.training = True
