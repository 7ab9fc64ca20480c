"""The micro-batches of a run, the next one collated by a thread while a step runs."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from typing import Any, Generic, TypeVar

from mitrain.data.cache import NotKept, reading_ahead
from mitrain.data.loader import Draw, Loader
from mitrain.data.streaming import StreamLoader

B = TypeVar("B")
Draws = Sequence[Draw[Any]]
Made = tuple[Draws, Any, Any]  # what was drawn, the batch (None: not made), the cursor behind it


class Batches(Generic[B]):
    """What ``make`` makes of the draws of ``loader``, in its order; ``state()`` is the cursor behind what was handed out.

    ``ahead``: one batch is drawn and made before it is asked for. It is of what the caches hold alone: frozen models belong
    to the step that runs meanwhile, so that a batch for which one must run is made when it is asked for. An error is raised
    for the batch that it belongs to.
    """

    def __init__(self, loader: Loader[Any] | StreamLoader, make: Callable[[Draws], B], ahead: bool):
        self.loader, self.make = loader, make
        self.ahead = ahead
        self._pool: ThreadPoolExecutor | None = None
        self._coming: Future[Made] | None = None
        self._made: Made = ((), None, None)

    def next(self) -> Draws:
        """The draws of the next batch."""
        if not self.ahead:
            self._made = (self.loader.next(), None, None)
        else:
            coming = self._coming or self._begin()
            self._made, self._coming = coming.result(), self._begin()
        return self._made[0]

    def _begin(self) -> "Future[Made]":
        self._pool = self._pool or ThreadPoolExecutor(1, "next batch")
        return self._pool.submit(self._next)

    def of(self, draws: Draws) -> B:
        """The batch of these draws, which was made already where they are the last ones."""
        drawn, batch, cursor = self._made
        if draws is not drawn or batch is None:
            return self.make(draws)
        self._made = (drawn, None, cursor)  # held by the step alone, which lets go of it
        return batch

    def _next(self) -> Made:
        draws = self.loader.next()
        cursor = self.loader.state()
        # Of copies: a batch that must be made again, in another order or by a frozen model, begins with the same choices.
        copies = [replace(draw, random=copy(draw.random)) for draw in draws]
        try:
            with reading_ahead():
                return draws, self.make(copies), cursor
        except NotKept:
            return draws, None, cursor

    def state(self) -> dict[str, Any]:
        return self._made[2] or self.loader.state()

    def load_state(self, state: dict[str, Any], other_samples: bool = False) -> None:
        """As the loader's; what was made ahead is dropped."""
        if self._coming is not None:
            self._coming.cancel() or self._coming.exception()  # the thread is through with the loader
        self._coming, self._made = None, ((), None, None)
        self.loader.load_state(state, other_samples)

    def close(self) -> None:
        """End the thread; a batch that was made ahead is kept, should another be asked for."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
