"""Features for the passes of a model that an adapter is attached to: bound around them, or given with a call.

What a forward pass infuses comes by ``adapter.bind({"image": x})`` or as the keyword ``model(..., infused={"image": x})``.
Of several adapters on one model, each attached under a name, one acts in a context: the one that is bound there, else the
one that `using_adapter` or `set_adapter` has chosen, else the first. The others leave the model as it is.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.errors import ModelError
from mitrain.methods.base import Adapter, turn_takers, without_wrapper
from mitrain.methods.mit.condition import Condition, Feature, make_condition
from mitrain.models.batch import ModalityInputs

Given = Mapping["BoundFeatures", Condition | None]
# Of the running call alone: of its thread and, where tasks of asyncio take turns in a thread, of its task.
BOUND: ContextVar[Given] = ContextVar("bound", default=MappingProxyType({}))
KEYWORDS: ContextVar[Given] = ContextVar("keywords", default=MappingProxyType({}))
CHOSEN: ContextVar[Mapping[nn.Module, str | None]] = ContextVar("chosen", default=MappingProxyType({}))
OFF: ContextVar[frozenset["BoundFeatures"]] = ContextVar("off", default=frozenset())
DEFAULTS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
"""The name of the adapter that acts, None for none: in a context, and where nothing is chosen there."""


class BoundFeatures(Adapter):
    """An adapter whose hooks read the features that are bound in the context (`contextvars`) of the forward pass."""

    _takes_turns = True
    takes_infused: ClassVar[bool] = True
    """Read by `mitrain.methods.base.call_without_losing_features`."""
    feature_widths: Mapping[str, int] = {}
    """The modalities that are bound, each with its feature width e."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._held: set[object] = set()  # one for each `bind` that is under way, in whatever context

    def attach(
        self,
        backbones: Mapping[str, PreTrainedModel],
        checkpoint: bool = False,
        backend: str = "auto",
        name: str | None = None,
    ) -> Self:
        """As `Adapter.attach`; under the ``name`` several take turns on one model."""
        if name is not None and not name.isidentifier():
            raise ModelError(f"{name[:40]!r} is no name of an adapter: give letters, digits and _, as in Python")
        self._name = name or self.traits.name
        super().attach(backbones, checkpoint, backend)
        for backbone in {*backbones.values(), *self._backbones.values()}:  # with PEFT's wrapper, which calls forward
            take = backbone.register_forward_pre_hook(self._take_keyword, prepend=True, with_kwargs=True)
            self._undo.callback(take.remove)
            self._undo.callback(backbone.register_forward_hook(self._drop_keyword, always_call=True).remove)
        return self

    def detach(self) -> None:
        """As `Adapter.detach`; what was attached later goes first."""
        for backbone in self._backbones.values():
            there = list(turn_takers(backbone))
            if self._name in there and (later := there[there.index(self._name) + 1 :]):
                raise ModelError(f"{', '.join(later)} was attached to the model after {self._name}: detach it first")
        super().detach()

    @property
    def _acts(self) -> bool:
        """Whether it is the one that acts in this context, and not `disabled` there."""
        return self not in OFF.get() and acting(self._backbones["text"]) is self

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, in this thread or asyncio task, it does not act, whatever is bound."""
        token = OFF.set(OFF.get() | {self})
        try:
            yield
        finally:
            OFF.reset(token)

    @contextlib.contextmanager
    def conditioned(self, inputs: ModalityInputs | None, copies: int = 1) -> Iterator[None]:
        shown = inputs.features if inputs is not None and inputs.infused and self.feature_widths else {}
        present = inputs.present if shown else {}
        with self.bind({name: (x, present[name]) if name in present else x for name, x in shown.items()}, copies):
            yield

    def modalities_of(self, feature: Tensor | None) -> dict[str, Feature]:
        """What `bind` takes for the encoders' features side by side, (B, e): as many of the columns as each modality
        of `feature_widths` is wide, in order. Empty without a feature, or for a method that reads none."""
        widths = self.feature_widths
        if feature is None or not widths:
            return {}
        if sum(widths.values()) != feature.shape[-1]:
            raise ModelError(
                f"the features are {feature.shape[-1]} wide, but the adapter's modalities are {dict(widths)}: give"
                " features of their widths side by side"
            )
        return dict(zip(widths, feature.split(list(widths.values()), -1), strict=True))

    @contextlib.contextmanager
    def bind(self, features: Mapping[str, Feature], copies: int | None = 1) -> Iterator[Self]:
        """The features of the samples in the forward passes (or ``generate``) inside; they are dropped at the end.

        features: name -> (B, e), or ((B, e), (B,) bool mask of the samples that have it), or None for a missing
        modality. copies: rows per sample, for ``generate`` its num_beams or num_return_sequences; None: as many as
        the batch asks for. Of the model's adapters this one acts inside. They are those of the thread, or of the asyncio
        task, that binds them, and of what it starts with a copy of its context (asyncio.to_thread).
        Raises ModelError where they don't fit the adapter or, inside, the batch.
        """
        if not self._backbones:
            raise ModelError(f"this {self.traits.name} adapter is not attached, so features have no effect: call attach()")
        condition, held = make_condition(features, self.feature_widths, copies), object()
        token = BOUND.set({**BOUND.get(), self: condition})
        self._held.add(held)
        try:
            with using_adapter(self._backbones["text"], self._name):
                yield self
        finally:
            self._held.discard(held)
            BOUND.reset(token)

    @property
    def condition(self) -> Condition | None:
        """The features of the running forward pass: the keyword ``infused=`` of the call, else the innermost bind.

        ModelError in a thread or task that has neither while another one holds a binding: it may be meant for this one or
        not.
        """
        if not self._acts:
            return None
        for given in (KEYWORDS.get(), BOUND.get()):
            if self in given:
                return given[self]
        if self._held:
            raise ModelError(
                "features are bound in another thread or task than the one that runs the model: call bind() in that of the"
                " forward pass (or generate), or give infused= with the call"
            )
        return None

    def _take_keyword(self, backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "infused" in kwargs and acting(self._backbones["text"]) is None:
            raise ModelError(
                "infused= was given to a model none of whose adapters acts here: choose one with mitrain.set_adapter or"
                " mitrain.using_adapter"
            )
        if "infused" in kwargs and acting(self._backbones["text"]) is self:
            condition = make_condition(kwargs.pop("infused"), self.feature_widths)
            KEYWORDS.set({**KEYWORDS.get(), self: condition})
        return args, kwargs

    def _drop_keyword(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        if self in KEYWORDS.get():
            KEYWORDS.set({other: given for other, given in KEYWORDS.get().items() if other is not self})


def acting(model: nn.Module) -> Adapter | None:
    """The adapter of a transformers model that acts in this context."""
    there = turn_takers(model)
    first = next(iter(there), None)
    name = CHOSEN.get().get(model, DEFAULTS.get(model, first))
    return there.get(name)  # nothing for one that was detached since: another must not answer in its place


def set_adapter(model: PreTrainedModel, name: str | None) -> None:
    """Let the adapter ``name`` act from now on, in every thread that has not chosen another; None: none of them."""
    DEFAULTS[checked(model, name)] = name


@contextlib.contextmanager
def using_adapter(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Inside, in this thread or asyncio task, the adapter ``name`` acts; None: none of them."""
    token = CHOSEN.set({**CHOSEN.get(), checked(model, name): name})
    try:
        yield
    finally:
        CHOSEN.reset(token)


def checked(model: PreTrainedModel, name: str | None) -> nn.Module:
    """The transformers model; ModelError where it has no adapter ``name``."""
    model = without_wrapper(model)
    if name is not None and name not in (there := turn_takers(model)):
        raise ModelError(f"no adapter {name!r} is attached to this model: it has {', '.join(there) or 'none'}")
    return model
