"""Tiles of the attention kernels: an explicit table per architecture, kernel and padded head width; nothing is tuned at
run time. Which entries compile without spills in their loops is audited by ``python kernels/bench machine-code``.
"""

from typing import NamedTuple

import torch
import triton

from mitrain_kernels.infused_attention.triton_forward import forward_kernel

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class Tile(NamedTuple):
    """A program's own rows, the rows of a step of its loop, its warps, and the stages of the loop's loads."""

    own: int
    step: int
    warps: int
    stages: int


# {kernel: {padded head width: tile}} for 16-bit types; narrower heads take the tile of 64.
SM_80 = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    "query": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
    "key": {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
}
SM_90 = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "query": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 16, 8, 2)},
    "key": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(16, 32, 8, 2)},
}
GFX942 = {
    "forward": {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    "query": {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
    "key": {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}
TILES = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_90, "gfx942": GFX942}
# Under the gate 'token', and of float32 tensors (without tensor cores): one tile up to a head width of 128. On sm_100 the
# keys' side stays below the 64 rows that UTC*MMA takes: Triton 3.7 fails to compile more.
ALL = ("forward", "query", "key")
TOKEN = {
    "sm_80": dict.fromkeys(ALL, Tile(64, 32, 8, 2)),
    "sm_90": dict.fromkeys(ALL, Tile(64, 32, 8, 2)),
    "sm_100": dict.fromkeys(ALL, Tile(64, 32, 8, 2)) | {"key": Tile(32, 32, 8, 2)},
    "gfx942": dict.fromkeys(ALL, Tile(32, 32, 4, 1)),
}
WIDE = {
    "sm_80": Tile(16, 16, 8, 2),
    "sm_90": Tile(16, 16, 8, 2),
    "sm_100": Tile(16, 16, 8, 2),
    "gfx942": Tile(16, 16, 4, 1),
}
DECODE = Tile(16, 64, 4, 2)
"""Of the decode kernel: its own rows are the heads of a group, at least 16."""
PROGRAMS, MOST_SPLITS = 264, 64
"""Decoding splits the keys until there are so many programs (two per SM of an H100), at most so often."""
SCAN = 256
"""Tokens that a scan takes at a time."""


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def tile_for(target: str, kernel: str, width: int, dtype: torch.dtype, token: bool) -> Tile:
    """``width`` is the padded head width."""
    if target == "interpreter":
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        return WIDE[target]
    return TOKEN[target][kernel] if token else TILES[target][kernel][max(width, 64)]


def target_of(device: torch.device) -> str:
    """The entry of ``TILES`` for a device: a GPU newer or smaller than those listed takes that of the nearest."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"
