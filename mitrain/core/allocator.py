"""What glibc does with memory that is freed, and where torch puts large tensors; elsewhere these functions do nothing."""

import contextlib
import ctypes
import os
from collections.abc import Mapping

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3


def keep_freed() -> None:
    """Ask glibc to keep large freed blocks instead of handing them back to the kernel after every operation, and torch to
    begin tensors of 2 MB and more at a page. Before the first tensor is made.

    Page faults on fresh blocks took up to two thirds of the CPU time of encoding images.
    """
    # posix_memalign looks for a hole of size + alignment. At torch's 64 bytes the rest of that hole is so small that malloc
    # probably gives it to other objects at once, and the hole a tensor leaves never takes another of its size (inferred:
    # with page alignment alone the heap stays as small). A page's rest stays free and is joined to the hole again.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    set_options({MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 1 << 30, TOP_PAD: 64 << 20})


def map_large() -> None:
    """Ask glibc to map blocks of 256 KB and more by themselves again, and to keep little at the heap's end: weights that are
    gathered and let go of in turn, of all sizes, leave holes in the heap that others do not fit."""
    set_options({MMAP_THRESHOLD: 1 << 18, TRIM_THRESHOLD: 32 << 20, TOP_PAD: 4 << 20})


def set_options(values: Mapping[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in values.items():
            libc.mallopt(option, value)


def give_back() -> None:
    """Hand all that is kept so back to the kernel: between parts of a run that hold memory of other kinds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
