"""Features for the passes of a model that an adapter is attached to: bound around them, or given with a call.

What a forward pass infuses comes by ``adapter.bind({"image": x})`` or as the keyword ``model(..., infused={"image": x})``.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.errors import ModelError
from mitrain.methods.base import Adapter
from mitrain.methods.mit.condition import Condition, Feature, make_condition
from mitrain.models.batch import ModalityInputs


class BoundFeatures(Adapter):
    """An adapter whose hooks read the features that are bound in the thread of the forward pass."""

    takes_infused: ClassVar[bool] = True
    """Read by `refusals.call_without_losing_features`."""
    feature_widths: Mapping[str, int] = {}
    """The modalities that are bound, each with its feature width e."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._bound: dict[int, list[Condition | None]] = {}  # by thread: several may run the model at a time
        self._keywords: dict[int, Condition | None] = {}

    def attach(self, backbones: Mapping[str, PreTrainedModel], checkpoint: bool = False, backend: str = "auto") -> Self:
        super().attach(backbones, checkpoint, backend)
        for backbone in {*backbones.values(), *self._backbones.values()}:  # with PEFT's wrapper, which calls forward
            take = backbone.register_forward_pre_hook(self._take_keyword, prepend=True, with_kwargs=True)
            self._undo.callback(take.remove)
            self._undo.callback(backbone.register_forward_hook(self._drop_keyword, always_call=True).remove)
        return self

    def detach(self) -> None:
        super().detach()
        self._keywords.clear()

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
        the batch asks for. They are those of the thread that binds them. Raises ModelError where they don't fit the
        adapter or, inside, the batch.
        """
        if not self._backbones:
            raise ModelError(
                f"this {self.traits.name} adapter is not attached, so features have no effect: call attach()"
            )
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

    def _take_keyword(self, backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "infused" in kwargs:
            own = threading.get_ident()
            self._keywords[own] = None
            self._keywords[own] = make_condition(kwargs.pop("infused"), self.feature_widths)
        return args, kwargs

    def _drop_keyword(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self._keywords.pop(threading.get_ident(), None)
