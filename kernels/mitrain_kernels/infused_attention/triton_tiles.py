"""Tiles of the attention kernels: an explicit table per architecture, kernel and padded head width; nothing is tuned at
run time. Which entries compile without spills in their loops is audited by ``python -m mitrain_kernels.aot``.
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


# {kernel: {padded head width: tile}} for 16-bit types; float32 tensors take the tiles of ``WIDE``.
SM_80 = {
    "forward": {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    "query": {32: Tile(128, 64, 8, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 8, 1)},
    "key": {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
}
SM_90 = {
    "forward": {32: Tile(128, 64, 4, 3), 64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2)},
    "query": {32: Tile(128, 64, 8, 2), 64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    "key": {32: Tile(64, 64, 4, 2), 64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
}
GFX942 = {
    "forward": {32: Tile(128, 64, 4, 1), 64: Tile(128, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    "query": {32: Tile(64, 64, 4, 1), 64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
    "key": {32: Tile(64, 32, 4, 1), 64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}
TILES = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_90, "gfx942": GFX942}
WIDE = {32: Tile(64, 32, 4, 1), 64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 8, 1)}
TOKEN = {32: Tile(64, 32, 4, 1), 64: Tile(64, 32, 4, 1), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 8, 1)}
SCAN = 256
"""Tokens that a scan takes at a time."""


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def tile_for(target: str, kernel: str, width: int, dtype: torch.dtype, token: bool) -> Tile:
    """``width`` is the padded head width."""
    if target == "interpreter":
        return Tile(16, 16, 4, 1)
    entry = max(width, 32)
    if dtype == torch.float32:
        return WIDE[entry]
    return TOKEN[entry] if token else TILES[target][kernel][entry]


def target_of(device: torch.device) -> str:
    """The entry of ``TILES`` for a device: a GPU newer or smaller than those listed takes that of the nearest."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"
