"""What keeps a long run honest: a budget for skipped steps, stop requests by signal, a watchdog for hangs.

None of these touches the training state. A stop request is a flag that the trainer reads at the next step boundary,
where it can save; outside of training a signal is an exception, so that what is half made is removed; a watchdog only
prints where every thread stands.
"""

import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, BinaryIO, Self, TextIO

from mitrain.core.errors import UserError

MEND = "lower train.lr or train.optimizer.clip"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
AGAIN_S = 1.0  # in which further signals are the same request: shells and launchers send several
DEAF_S = 3.0  # for which the main thread may be in a library's call, or a callback, when a signal comes


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

    A few skipped steps are normal (an fp16 overflow, a batch of unreadable files); many mean that nothing is
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


class Handlers:
    """SIGINT, SIGTERM, SIGUSR1 and SIGHUP (unless nohup ignores it) go to ``_handle`` inside the context.

    The former handlers come back on leaving it. Outside the main thread, where Python has no signal handlers, nothing is
    installed.
    """

    def __init__(self) -> None:
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class Interrupted(KeyboardInterrupt):
    """A signal asked a command to end; ``number`` is the signal's."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class Interruptible(Handlers):
    """Inside, a signal raises `Interrupted` where the main thread stands, so that what is half made is removed.

    A thread that is in a library's call, as a rank that waits for the others, hears nothing: then the process ends
    `DEAF_S` seconds later with 128 + the signal's number. Where other code has swallowed the exception, as a callback
    does, the signal is sent again after that time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heard = -math.inf
        self._raised: Callable[[], Interrupted | None] = lambda: None

    def __enter__(self) -> Self:
        super().__enter__()
        if self._former:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._other = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # written to whatever Python does
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._former:
            signal.set_wakeup_fd(self._other)
            os.close(self._write)
        super().__exit__()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        before, self._heard = self._heard, time.monotonic()
        if self._heard - before > AGAIN_S:
            raise self._noted(Interrupted(number))

    def _noted(self, error: Interrupted) -> Interrupted:
        """The error, which a variable of the frame that raises it would keep alive by its traceback."""
        self._raised = weakref.ref(error)  # dead as soon as nobody handles it
        return error

    def _watch(self) -> None:
        with open(self._read, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if self._in_charge(number[0]):
                    self._insist(number[0], signals)

    def _in_charge(self, number: int) -> bool:
        return signal.getsignal(number) == self._handle

    def _insist(self, number: int, signals: BinaryIO) -> None:
        came = time.monotonic()
        time.sleep(DEAF_S)
        if select.select([signals], [], [], 0)[0]:
            signals.read(select.PIPE_BUF)  # those of the meantime: when they came is not known
        if not self._in_charge(number):
            return
        if self._heard < came - DEAF_S:
            say(f"mitrain: stopped by {signal.Signals(number).name} in a call that did not return")
            os._exit(128 + number)
        if self._raised() is None:
            os.kill(os.getpid(), number)


class StopRequest(Handlers):
    """Turns a signal into a request to stop at the next step boundary.

    ``requested`` is the signal's name once one has come. A second SIGINT raises KeyboardInterrupt at once, or, inside
    ``with stop.shield():`` (a checkpoint is being written), when the shielded block has ended. ``request()`` asks, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested: str | None = None
        self._shields = 0
        self._abort = False

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
