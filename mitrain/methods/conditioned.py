"""Methods whose parts in the text model read, in a pass, what they make of a sample's other inputs before it."""

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from mitrain.methods.base import Adapter
from mitrain.models.batch import ModalityInputs


class ConditionedAdapter(Adapter):
    """`conditioned` keeps what `_perceive` makes of the inputs for the passes of its thread; hooks find it in ``_seen``,
    None where nothing is to be read: they then leave the frozen model as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._passes: dict[int, Any] = {}  # by thread

    @abstractmethod
    def _perceive(self, inputs: ModalityInputs) -> Any:
        """What the hooks read of a batch."""

    @property
    def _seen(self) -> Any:
        return self._passes.get(threading.get_ident())

    @contextlib.contextmanager
    def conditioned(self, inputs: ModalityInputs | None, copies: int = 1) -> Iterator[None]:
        thread, before = threading.get_ident(), self._seen
        if inputs is not None and copies > 1:
            inputs = inputs.rows(torch.arange(len(inputs), device=inputs.device).repeat_interleave(copies))
        self._passes[thread] = None if inputs is None or not inputs.infused else self._perceive(inputs)
        try:
            yield
        finally:
            self._passes.pop(thread, None)  # one within this one has perhaps
            if before is not None:
                self._passes[thread] = before

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        with self.conditioned(None):
            yield
