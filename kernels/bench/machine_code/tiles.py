"""The search for tiles: ``python kernels/bench machine-code --search``.

Every tile that may serve an entry of infused_attention's tables is compiled and audited as the entry itself is. Of those
without a violation the best is the one with the highest wide roof (``pipes.py``), then narrow roof, then blocks per SM;
on gfx942, where no roof is estimated, the one with the fewest instructions for each row of queries or keys.

A search takes most of an hour on two cores for each target. It goes on where it was stopped, as rows are kept in the
user's cache.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from mitrain_kernels.infused_attention.triton_launch import Tile, padded

from bench.machine_code.attention_cases import KERNELS, attention_case
from bench.machine_code.audit import LIMITS
from bench.machine_code.compilation import Case

ENTRIES = [*itertools.product(KERNELS, (64, 128, 256), [False]), *itertools.product(KERNELS, (128,), [True])]
"""(kernel, head width, whether under the gate 'token')"""
OWN, STEP, WARPS = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8)
"""16 is for heads of 256 alone. Loads have two stages: a third changes what waits, not what is done."""
REGISTERS = 208
"""Of a thread, for sums and scores: the others hold addresses and operands."""
TRIED, SHOWN = 8, 3
"""So many of an entry's tiles are compiled, the largest first, as they read least; so many of them are printed."""


def candidates(target: str, kernel: str, width: int) -> list[Tile]:
    """Tiles whose warps need not repeat each other, whose sums fit in registers and whose loads in shared memory."""
    found = sorted(possible(target, kernel, width), key=lambda tile: (-tile.own * tile.step, tile.warps))
    return found[:TRIED]


def possible(target: str, kernel: str, width: int) -> Iterator[Tile]:
    ways = (False, True) if kernel == "key" and width == 256 else (False,)
    for own, step, warps, apart in itertools.product(OWN, STEP, WARPS, ways):
        stages, nonkdim = (1, 16) if target.startswith("gfx") else (2, 0)
        tile = Tile(own, step, warps, stages, nonkdim, apart)
        if min(own, step) >= (16 if width == 256 else 32) and fits(tile, target, kernel, width):
            yield tile


def fits(tile: Tile, target: str, kernel: str, width: int) -> bool:
    own, step, warps, stages, nonkdim, apart = tile
    large = own >= 64 and target in ("sm_90", "sm_100")  # HGMMA, UTC*MMA: four warps share 64 rows, or all 128
    by_rows = own >= 16 * warps or (large and target == "sm_100")
    by_columns = own < width and step >= (16 if nonkdim else 8) * warps and not large
    sums = own * width * (2 if kernel == "key" and not apart else 1) + own * step * (1 if kernel == "forward" else 2)
    loads = 2 * 2 * stages * step * width
    registers = 2 * REGISTERS if nonkdim else REGISTERS  # gfx942 has as many again for sums
    lanes = warps * (64 if nonkdim else 32)
    return (by_rows or by_columns) and sums <= registers * lanes and loads <= LIMITS[target].shared_per_block


def work(targets: Sequence[str]) -> list[tuple[Case, str]]:
    """Every case to compile, with its target."""
    return [
        (attention_case(target, kernel, width, "bf16", token, tile), target)
        for target in targets
        for kernel, width, token in ENTRIES
        for tile in candidates(target, kernel, padded(width))
    ]


def merit(row: dict[str, Any]) -> tuple:
    """Higher is better."""
    own = row["constants"]["BN" if "key" in row["kernel"] else "BM"]
    narrow, wide, _ = row["roofs"] or (0, -row["instructions"] / own, 0)
    return row["ok"], wide, narrow, row["blocks_per_sm"]


def best(rows: Sequence[dict[str, Any]], shown: int = SHOWN) -> list[dict[str, Any]]:
    """The best rows of each entry, best first."""
    entries: dict[tuple, list] = {}
    for row in rows:
        entries.setdefault((row["target"], row["kernel"], row["head_dim"]), []).append(row)
    return [row for found in entries.values() for row in sorted(found, key=merit, reverse=True)[:shown]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the best tiles of each entry, their roofs, what they take."""
    lines = [
        "| target | kernel | d | own × step, warps, stages | narrow, wide, alternating % | registers | shared B | blocks |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in best(rows):
        a, b = ("BN", "BM") if "key" in row["kernel"] else ("BM", "BN")
        tile = f"{row['constants'][a]} × {row['constants'][b]}, {row['warps']}, {row['stages']}"
        kdim = row["options"].get("matrix_instr_nonkdim")
        tile += ", dV then dK" if row["constants"].get("APART") else ""
        name = row["kernel"].removeprefix("infused_attention_")
        cells = [row["target"], name, row["head_dim"], tile + (f", {kdim} × {kdim}" if kdim else "")]
        cells += [", ".join(map(str, row["roofs"])) or "–", row["registers"], row["shared_bytes"], row["blocks_per_sm"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |" + ("" if row["ok"] else " " + row["reasons"][0]))
    return "\n".join(lines)
