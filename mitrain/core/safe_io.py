"""Reading files that a stranger may have made or a crash may have torn: plain files, JSON objects, safetensors.

Never a pickle, never through a link, never more than the size expected. Every fault is a CheckpointError of one line;
``mend`` is how the line ends: what the user should do.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from mitrain.core import parsing
from mitrain.core.errors import CheckpointError


def regular_size(path: Path, mend: str) -> int:
    """The size of a plain file; links and devices are refused, for what mitrain writes never holds any."""
    try:
        info = os.lstat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({getattr(error, 'strerror', error)}): {mend}") from None
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a plain file: {mend}")
    return info.st_size


def read_regular(path: Path, limit: int, mend: str) -> bytes:
    """A plain file's content, without following a link; one longer than ``limit`` bytes is refused unread."""
    regular_size(path, mend)
    try:
        return parsing.read_bytes(path, limit, follow=False)
    except parsing.Unreadable as error:
        raise CheckpointError(f"{path} {error}: {mend}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): {mend}") from None


def parse_json(content: bytes, path: Path, mend: str, finite: bool = False) -> dict[str, Any]:
    """The JSON object in ``content``; ``finite`` refuses NaN and infinities, which Python's parser takes for numbers."""
    try:
        value = parsing.parse_json(content, finite)
    except parsing.Unreadable as error:
        raise CheckpointError(f"{path} {error}: {mend}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: {mend}")
    return value


def parse_tensors(content: bytes, path: Path, mend: str) -> dict[str, Tensor]:
    try:
        return safetensors.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({str(error)[:100]}): {mend}") from None


def misfits(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``saved`` from taking the place of ``own``: names and shapes that differ, and what is not finite."""
    floats = [name for name in own.keys() & saved.keys() if own[name].is_floating_point()]
    wrong = [f"{name} holds no plain numbers" for name in floats if not is_finite(saved[name])]
    return sorted(wrong + unlike(*({name: tensor.shape for name, tensor in part.items()} for part in (own, saved))))


def unlike(own: Mapping[str, Sequence[int]], saved: Mapping[str, Sequence[int]]) -> list[str]:
    """How the names and shapes of ``saved`` tensors differ from our ``own``."""
    wrong = [f"{name} is missing" for name in sorted(own.keys() - saved.keys())]
    wrong += [f"{name[:60]} is unknown" for name in sorted(saved.keys() - own.keys())]
    shared = [name for name in sorted(own.keys() & saved.keys()) if tuple(own[name]) != tuple(saved[name])]
    return wrong + [f"{name} has shape {list(saved[name])}, here {list(own[name])}" for name in shared]


def first_of(wrong: Sequence[str]) -> str:
    """The first three faults, and how many more there are."""
    return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return False
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())  # 8 bits lack isfinite
