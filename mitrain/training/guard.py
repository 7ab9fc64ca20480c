"""What keeps a long run honest: a budget for skipped steps, stop requests by signal, a watchdog for hangs.

None of these touches the training state. A stop request is a flag that the trainer reads at the next step boundary,
where it can save; a watchdog only prints where every thread stands.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from mitrain.core.errors import UserError

MEND = "lower train.lr or train.optimizer.clip"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def diverged(what: str, step: int, saved: int) -> UserError:
    """The error of a model that is not finite at ``step``; ``saved``: the step of its newest checkpoint, 0 for none."""
    return UserError(f"{what} at step {step}, the model has diverged: {advice(saved)}")


def advice(saved: int) -> str:
    """How to go on after steps that came to nothing."""
    if saved:
        return f"the checkpoint of step {saved} is the last finite one; {MEND} and resume it with --allow-changes"
    return f"{MEND} and start again (no checkpoint was written yet)"


class SkipBudget:
    """How many steps may be skipped, in a row and altogether, before a run is not worth continuing.

    A few skipped steps are normal (an fp16 overflow, a batch of unreadable images); many mean that nothing is
    learned while the clock runs.
    """

    def __init__(self, in_a_row: int = 10, total: int = 100):
        self.limits = {"in a row": in_a_row, "in total": total}
        self.in_a_row = 0
        self.reasons: Counter[str] = Counter()

    def record(self, step: int, reason: str | None, saved: int = 0) -> None:
        """Count one step: ``reason`` None if it was applied. UserError when the budget is spent.

        ``saved``: the step of the newest checkpoint, for the message.
        """
        if reason is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.reasons[reason] += 1
        counts = {"in a row": self.in_a_row, "in total": self.reasons.total()}
        for how, limit in self.limits.items():
            if counts[how] > limit:
                raise UserError(
                    f"{counts[how]} steps skipped {how} at step {step}, more than the {limit} allowed "
                    f"({self.describe()}; the last applied step was {step - self.in_a_row}): {advice(saved)}, "
                    "or look for a bad sample"
                )

    def failed(self, step: int) -> UserError:
        """The error of a run that came to its end at ``step`` and applied no step."""
        return UserError(
            f"none of {step} steps was applied ({self.describe()}): nothing was learned: {MEND} and start again"
        )

    def describe(self) -> str:
        return ", ".join(f"{reason} {count} times" for reason, count in self.reasons.most_common())

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where these are no counts."""
        counts = [state["in_a_row"], *dict(state["reasons"]).values()]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"no numbers of skipped steps: {str(counts)[:40]}")
        self.in_a_row, self.reasons = state["in_a_row"], Counter(state["reasons"])


class StopRequest:
    """Turns SIGINT, SIGTERM, SIGUSR1 and SIGHUP (unless nohup ignores it) into a request to stop at the next step boundary.

    ``requested`` is the signal's name once one has come. A second SIGINT raises KeyboardInterrupt at once, or, inside
    ``with stop.shield():`` (a checkpoint is being written), when the shielded block has ended. The former handlers
    come back on leaving the context. Outside the main thread, where Python has no signal handlers, nothing is
    installed and only ``request()`` asks.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._former: dict[int, Any] = {}
        self._shields = 0
        self._abort = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._former:
            number, handler = self._former.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(self, why: str) -> None:
        """Ask to stop; the first reason stays."""
        self.requested = self.requested or why

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again = self.requested is not None
        self.request(signal.Signals(number).name)
        if not again:
            say(f"{self.requested}: stopping after this step; Ctrl-C again aborts at once and saves nothing")
        elif number == signal.SIGINT and self._shields:
            self._abort = True
            say("aborting as soon as the checkpoint is written")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Put an abort off until the block has ended: what it writes is written whole."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
            if self._abort and not self._shields:
                self._abort = False
                raise KeyboardInterrupt


def say(line: str) -> None:
    """Write to standard error by one system call: safe in a signal handler, where ``print`` may be re-entered."""
    with suppress(OSError):  # the terminal may be what has gone
        os.write(2, f"\n{line}\n".encode())


class Heartbeat:
    """Prints the stacks of all threads when ``minutes`` pass without a ``beat()``, and again every ``minutes``.

    A hang (a dead disk, a lock that is never released, a collective that a rank never joins) then says where it
    is. Nothing is interrupted. Zero minutes turn it off. There is one watchdog per process.
    """

    def __init__(self, minutes: float, file: TextIO | None = None):
        self.seconds = minutes * 60
        self.file = file or sys.__stderr__

    def __enter__(self) -> "Heartbeat":
        self.beat()
        return self

    def beat(self) -> None:
        if self.seconds > 0:
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=self.file)

    def __exit__(self, *_: object) -> None:
        if self.seconds > 0:
            faulthandler.cancel_dump_traceback_later()
