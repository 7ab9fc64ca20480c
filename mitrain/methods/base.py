"""The adapter protocol: what a method must offer so that training, evaluation and checkpoints need not know it.

An adapter is a module of trainable parameters that attaches to frozen Hugging Face models through hooks, wrapped
modules and the attention interface, and takes itself off again without a trace. How the methods meet it:

    MiT     binds one vector per modality; maps in the infused layers turn it into factors of keys, values and FFN.
    PMF     attaches to two encoders: ``encode`` runs the fusion layers of both in turn, each once for its query
            prompts and once for the fusion; its first layers = depth - L_f.
    MoPE    attaches to two encoders: every layer of the main one gets prompts that depend on the other's
            vector, with weights from a router; ``extra_loss`` is the importance loss; its first layers = 0.
    Aurora  a forward hook of every tuned projection adds U diag(λ ⊙ p_n) Vᵀ x, with U and V shared by all backbones;
            needs no features; ``merge`` adds the same matrices to the frozen weights.

Public names are for training, tasks and users; those with an underscore are between this class and the methods.
"""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ModelError
from mitrain.methods import export_format
from mitrain.models import frozen, quant
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.digests import stored_digests
from mitrain.models.layers import Layers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traits:
    """What a method is, before it is attached to anything.

    ``name``: of its settings (``Section``), in METHODS and of the submodule that it is while attached; no points.
    ``backbones``: those that it attaches to; with ``encoder``, the first of another modality, ``encode`` is given the states
    that enter its changed layers.
    ``runs_layers``: it runs the layers itself: ``encode`` is always given the states that enter each backbone's first
    changed layer. ``wraps_text_model``: ``encode`` goes through a model around the text model, which the language head
    knows nothing of. ``text_depends_on_input``: so does ``Outputs.text``; ``infused=False`` of the inputs leaves them out
    while the rest stays. ``conditions_text``: `conditioned` gives passes of the text model alone all that the method reads,
    though it attaches to the encoder, too, so that the language head sees it. ``reads_tokens``: of the encoder it attaches
    to it reads the final tokens and changes nothing, so that a convolutional one serves, too.
    ``checkpointing``: it can keep only the inputs of the changed layers for backward and compute the rest again.
    """

    name: str
    backbones: tuple[str, ...] = ("text",)
    runs_layers: bool = False
    wraps_text_model: bool = False
    text_depends_on_input: bool = False
    conditions_text: bool = False
    reads_tokens: bool = False
    checkpointing: bool = False

    @property
    def changes_encoder(self) -> bool:
        """Whether it attaches to the first encoder of another modality, too."""
        return "encoder" in self.backbones


@dataclass(frozen=True)
class Attachment:
    """What follows from the backbones that an adapter is attached to.

    ``first_layers``: of each backbone the lowest layer that the adapter changes (their number where it changes none);
    those below are a frozen function. ``encoder_width``, ``joint_width``: widths of the changed encoder's vector and of
    ``Outputs.joint``; 0: the frozen encoder's feature, and no joint state. ``modalities``: the features that
    ``conditioned`` gives to passes of the text model alone, with their widths e.
    For the dry run and comparisons: ``infused_parameters``, by the index of each text layer that infused attention runs
    in, and ``macs``, the multiply-accumulates that the method adds to a sample's forward pass; None: not known.
    ``peft``: of each backbone PEFT's own configuration and its name for each of our tensors there (None for others'),
    where PEFT can load the adapter by itself.
    """

    first_layers: Mapping[str, int]
    encoder_width: int = 0
    joint_width: int = 0
    modalities: Mapping[str, int] = field(default_factory=dict)
    infused_parameters: Mapping[int, int] = field(default_factory=dict)
    macs: int | None = None
    peft: Mapping[str, tuple[Any, Callable[[str], str | None]]] = field(default_factory=dict)


class Adapter(nn.Module, ABC):
    """Trainable parameters beside frozen backbones.

    While attached, the adapter is a submodule of each backbone under its method's name, so an optimizer built from a
    backbone's trainable parameters gets the adapter's and no others; ``state_dict()`` holds adapter tensors only.
    The backbones stay without gradients and in eval mode, also after ``backbone.train()``.
    """

    traits: Traits
    """The class's; its constructor replaces what depends on the settings."""
    config: Section
    """The settings, all that its constructor takes; an export writes them and makes the adapter from them again."""
    attachment: Attachment | None
    """None while it is attached to nothing."""
    _takes_turns = False
    """Whether several may be attached to a model, each under a name of its own, of which one acts at a time."""
    _name = ""
    """Of the submodule that it is while attached, where it is not the method's."""

    def __init__(self) -> None:
        super().__init__()
        self.attachment = None
        self._backbones: dict[str, PreTrainedModel] = {}
        self._undo = contextlib.ExitStack()
        self._encoder: Layers | None = None  # that a method changes by modules or weights
        self._backend, self._checkpoint, self._disabled = "auto", False, False

    # What a method implements

    @abstractmethod
    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        """Check the backbones, create parameters, put hooks in place; give ``_undo.callback`` what takes each off again.

        ``_backend`` and ``_checkpoint`` are what `attach` was asked for. Called again after `detach`, perhaps with other
        backbones: existing parameters are kept, and must fit. Also called on models without storage (meta device), where
        the tensors get the same names and shapes.
        """

    def _calibrate(self, run: Callable[[], None]) -> None:
        """See `mitrain.methods.calibrate`; nothing to do, and ``run`` not called, where a method has no statistics."""

    def encode(self, texts: TextBatch | None, inputs: ModalityInputs | None) -> Outputs:
        """One pass of the adapted backbones over texts, other inputs or (row by row) both.

        With one of them alone it is what a dual encoder needs: that one by itself.
        """
        text, vectors = None, {} if inputs is None else inputs.features
        if texts is not None:
            with self.conditioned(inputs):
                text = frozen.last_hidden(self._backbones["text"], texts)
        if inputs is not None and self._encoder is not None:
            vectors = inputs.with_vector(self._encoder.encode_tokens(inputs)[1])
        return Outputs(text, texts and texts.mask, vectors)

    @contextlib.contextmanager
    def conditioned(self, inputs: ModalityInputs | None, copies: int = 1) -> Iterator[None]:
        """Inside, passes of the text model alone (``generate`` with ``copies`` rows per sample) are given ``inputs`` where
        the method reads them there; nothing to do for one that only `encode` gives them to."""
        yield

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the backbones compute what they would without the adapter: hooks look at ``_disabled``."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def extra_loss(self) -> tuple[Tensor, Tensor] | None:
        """A regulariser of the last forward pass as (sum, count), or None; training adds its mean to the loss's mean."""
        return None

    def usage(self) -> Mapping[str, float]:
        """What a row of a comparison is to keep of the last training pass, as how evenly experts were used."""
        return {}

    def merge(self) -> None:
        """Fold the adapter into the frozen weights, where its effect does not depend on the input, and `detach` it."""
        raise ModelError(f"{self.traits.name} depends on each sample's features and cannot be merged: keep it attached")

    # What every method inherits

    def attach(self, backbones: Mapping[str, PreTrainedModel], checkpoint: bool = False, backend: str = "auto") -> "Adapter":
        """Freeze ``backbones`` and install the adapter in them; on an error they are left as they were.

        checkpoint: activation checkpointing of the layers that the adapter changes. backend: see ``KernelConfig``.
        Raises ModelError where one of ``backbones`` is missing, has such an adapter or is computed wrongly here.
        """
        name, given = self._name or self.traits.name, list(backbones.values())
        backbones = {key: without_wrapper(model) for key, model in backbones.items()}
        if self._backbones:
            raise ModelError(f"this {name} adapter is attached already: call detach() first")
        check_free(backbones, name)
        if missing := [each for each in self.traits.backbones if each not in backbones]:
            raise ModelError(
                f"{name} attaches to {' and '.join(self.traits.backbones)} models: give it the {missing[0]} model"
            )
        if checkpoint and not self.traits.checkpointing:
            raise ModelError(f"{name} has no activation checkpointing: switch it off")
        for backbone in backbones.values():
            quant.check_four_bit(backbone)
        self._backend, self._checkpoint = backend, checkpoint
        try:
            for backbone in backbones.values():
                self._freeze(backbone)
            self.attachment = self._install(backbones)
            self._backbones = dict(backbones)
            for backbone in backbones.values():
                backbone.add_module(name, self)
                self._undo.callback(delattr, backbone, name)
            outside = [*given, *backbones.values()]
            for model in {*outside, *(getattr(each, "base_model", each) for each in outside)}:
                self._undo.callback(guard_saving(model, name))
            self.train(self.training)
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Leave the backbones exactly as found; the adapter keeps its parameters and can be attached again."""
        self._undo.close()
        self._backbones, self.attachment = {}, None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the attached adapter to a new ``folder``, whole or not at all; PEFT's own files too where it has such.

        `mitrain.load_adapter` attaches it to another model of the same shape. A run is exported with its head and
        encoders by ``mitrain export``.
        """
        if "text" not in self._backbones:
            raise ModelError(f"this {self.traits.name} adapter is not attached to a language model: call attach() first")
        model, tensors, alone = self._backbones["text"], self.state_dict(), self.traits.backbones == ("text",)
        names = {side: export_format.without_home(each.name_or_path) for side, each in self._backbones.items()}
        counts = export_format.count([self], model, self._others(model))
        fields = export_format.method_fields(self.traits.name, self.config, model.config, names["text"], counts)
        fields["frozen"] = stored_digests(model, self) or None
        peft = export_format.peft_files(self.attachment.peft, alone, tensors, names)
        return export_format.publish(folder, fields, {"adapter": tensors}, export_format.model_card, peft)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._backbones:  # a copy's hooks would be the original's
            raise ModelError(
                f"a model with a {self.traits.name} adapter attached cannot be copied or pickled: call the adapter's"
                " detach() first, and attach again (or mitrain.load_adapter) on the copy"
            )
        return super().__reduce_ex__(protocol)

    def train(self, mode: bool = True) -> "Adapter":
        """Set the adapter's own mode; the frozen backbones around it go back to eval mode."""
        super().train(mode)
        for backbone in self._backbones.values():
            own = {module for adapter in (self, *self._others(backbone)) for module in adapter.modules()}
            for module in backbone.modules():
                if module not in own:
                    module.training = False
        return self

    def _others(self, backbone: nn.Module) -> list["Adapter"]:
        """The adapters that this one takes turns with on the ``backbone``, in the order in which they were attached."""
        return [each for each in turn_takers(backbone).values() if self._takes_turns and each is not self]

    def _freeze(self, backbone: PreTrainedModel) -> None:
        others = self._others(backbone)
        theirs = {part for each in others for part in (*each.parameters(), *each.modules())}
        named = {name: p for name, p in backbone.named_parameters() if p.requires_grad and p not in theirs}
        trainable = list(named.values())
        if trainable and any(not p.requires_grad for p in backbone.parameters()):  # someone's choice
            names = list(named)
            log.warning(
                "%s froze %d tensors that were to be trained (%s …): to train them beside it, call requires_grad_(True) on"
                " them afterwards, before the optimizer is made",
                *(self.traits.name, len(names), names[0]),
            )
        training = [module for module in backbone.modules() if module.training and module not in theirs]
        self._undo.callback(_restore, trainable, training)
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False


def turn_takers(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model of which one acts at a time, by their names, in the order in which they were attached."""
    return {n: child for n, child in model.named_children() if isinstance(child, Adapter) and child._takes_turns}


def without_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside PEFT's ``PeftModel``; any other model as it is."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{type(model).__name__} puts trained vectors before the text ({model.peft_type.value}), which would be"
            " infused as tokens: attach to a model with LoRA or IA³, or to model.get_base_model()"
        )
    return model.get_base_model()


def check_free(backbones: Mapping[str, PreTrainedModel], method: str) -> None:
    """ModelError where one of the ``backbones`` has such an adapter."""
    for name, backbone in backbones.items():
        if hasattr(backbone, method):
            raise ModelError(
                f"the {name} model has a {method} adapter (or attribute) already: detach it first, or give another name="
            )


def _restore(trainable: list[nn.Parameter], training: list[nn.Module]) -> None:
    for parameter in trainable:
        parameter.requires_grad_(True)
    for module in training:
        module.training = True


# What would lose an adapter, or the features given to it, without a word: refused in one line instead.


def guard_saving(model: nn.Module, method: str) -> Callable[[], None]:
    """Refuse ``model.save_pretrained`` while a ``method`` adapter is attached; returns what takes the refusal off."""
    before = vars(model).get("save_pretrained")
    model.save_pretrained = partial(refuse_saving, method)

    def undo() -> None:
        del model.save_pretrained
        if before is not None:
            model.save_pretrained = before

    return undo


def refuse_saving(method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ModelError(
        f"the model has a {method} adapter attached, which save_pretrained of the model would lose: save the adapter with"
        " its own save_pretrained(folder), or call its detach() (or merge()) before you save the model"
    )


def call_without_losing_features(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """A model's call, refused where features are given to one that would drop them: transformers takes any keyword."""
    for name in kwargs:
        if name.startswith("infus") and not (name == "infused" and any(map(takes_infused, model.children()))):
            raise ModelError(
                f"{type(model).__name__} was called with {name}=, which nothing reads: give infused= to the very model that"
                " an adapter is attached to (mitrain.attach, mitrain.load_adapter)"
            )
    return nn.Module.__call__(model, *args, **kwargs)


def takes_infused(module: nn.Module) -> bool:
    return getattr(module, "takes_infused", False)


# Attached or not: a plain model would answer without the picture as if it had seen it.
PreTrainedModel.__call__ = call_without_losing_features
