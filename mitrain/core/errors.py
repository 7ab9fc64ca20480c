"""Errors that are the user's to mend: one line each, saying what is wrong, where, and what to do.

The command line prints such an error as one line and exits with code 2; anything else is a bug in mitrain
and keeps its traceback.
"""

import difflib
import errno
import importlib
import os
import signal
from collections.abc import Iterable
from types import ModuleType

from mitrain.core.terminal import printable

PREEMPTED = 75
"""Exit code of a run that a scheduler's signal ended with a checkpoint saved: in sysexits.h, a failure that passes."""

LONGEST = 4000
"""Characters of a message; what a file says of itself may have millions, and the end says what to do."""


class UserError(Exception):
    """Bad input of any kind. The message is one line and ends with what to do."""

    exit_code = 2

    def __init__(self, message: str):
        words = " ".join(str(message).split())
        middle = "" if len(words) <= LONGEST else " […] "
        super().__init__(printable(words if not middle else words[: LONGEST // 2] + middle + words[-LONGEST // 2 :]))


class ConfigError(UserError):
    """A configuration that does not parse, does not fit its schema, or contradicts itself."""


class DataError(UserError):
    """An annotation file, image or data folder that cannot be used."""


class ModelError(UserError):
    """A backbone that cannot be found, loaded or attached to."""


class CheckpointError(UserError):
    """A checkpoint or run folder that is missing, torn, corrupted or of another shape."""


class PrepareError(UserError):
    """A model or data set that could not be brought onto this machine."""


class RankError(UserError):
    """Processes of one run that cannot find, or have lost, one another."""


class MissingExtraError(UserError):
    """An optional dependency that is needed here and not installed."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that ``word`` may have been meant to be, as the end of a message; empty where none is alike."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Of Python, or of torch, whose allocators on the CPU and on a GPU each say it in their own way, or of a mapped file."""
    words = ("CUDA out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    words = (*words, os.strerror(errno.ENOMEM))
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
    )


def exit_code(error: BaseException) -> int:
    """What ``mitrain`` ends with after ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT)
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    return UserError.exit_code if isinstance(error, UserError | OSError) or is_out_of_memory(error) else 1


def need_extra(module: str, extra: str, what: str) -> ModuleType:
    """Import ``module`` or fail with one line that names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs the package {module!r} ({error}): install it with pip install 'mitrain[{extra}]'"
        ) from None
