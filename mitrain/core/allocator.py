"""What glibc does with memory that is freed, and where torch puts large tensors; elsewhere these functions do nothing."""

import contextlib
import ctypes
import os


def keep_freed() -> None:
    """Ask glibc to keep large freed blocks instead of handing them back to the kernel after every operation, and torch to
    begin tensors of 2 MB and more at a page. Before the first tensor is made.

    Page faults on fresh blocks took up to two thirds of the CPU time of encoding images.
    """
    # posix_memalign looks for a hole of size + alignment. At torch's 64 bytes the rest of that hole is so small that malloc
    # probably gives it to other objects at once, and the hole a tensor leaves never takes another of its size (inferred:
    # with page alignment alone the heap stays as small). A page's rest stays free and is joined to the hole again.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((mmap_threshold, 32 << 20), (trim_threshold, 1 << 30), (top_pad, 64 << 20)):
            libc.mallopt(option, value)


def give_back() -> None:
    """Hand all that is kept so back to the kernel: between parts of a run that hold memory of other kinds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
