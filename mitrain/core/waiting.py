"""How long a process waits for another, and calls that end in that time whatever they wait for."""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from mitrain.core.errors import RankError

T = TypeVar("T")


def timeout(name: str = "MITRAIN_TIMEOUT", default: float = 1800) -> float:
    """Seconds of ``$MITRAIN_TIMEOUT`` (1800), or another such variable, after which another process is given up."""
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e7:
        raise RankError(f"{name}={text[:40]} is no number of seconds: give 1 or more")
    return seconds


def within(seconds: float, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises; TimeoutError where it takes longer, and it is then left behind in its thread.

    Signals are heard meanwhile, which a call into a library's own code would put off to its end.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # the caller's thread raises it again
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"timed out after {seconds:g} s")
    return results[0]
