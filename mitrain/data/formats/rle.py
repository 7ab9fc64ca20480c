"""COCO's segmentations as masks: polygons, and run lengths both as a list and compressed into a string.

Run lengths are checked here, in Python, before any memory is filled: pycocotools trusts them, and reads and writes
past its buffers when they are wrong. Its way of filling polygons is the one that published numbers rest on, so that
is what polygons go through.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mitrain.core.errors import need_extra

FAR = 16  # a polygon's corner may lie this many picture sizes outside, at most


def decode_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool: the union of all parts. ``segmentation`` is COCO's: polygons, or one or several run lengths.

    Raises ValueError where it is malformed or of another size.
    """
    mask = np.zeros(size, bool)
    for part in parts_of(segmentation):
        mask |= decode_runs(part, size) if isinstance(part, dict) else fill_polygon(part, size)
    return mask


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """(h, w) bool as ``{"size": [h, w], "counts": …}``, the run lengths that `decode_runs` reads."""
    flat = mask.T.ravel()
    edges = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), len(flat)]
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if len(flat) and flat[0] else counts}


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> None:
    """Raises ValueError where `decode_mask` would, without filling anything."""
    for part in parts_of(segmentation):
        (run_lengths if isinstance(part, dict) else check_polygon)(part, size)


def parts_of(segmentation: Any) -> list:
    """Polygons and run lengths. COCO has polygons of one or two corners beside whole ones: they cover nothing."""
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list) or not parts:
        raise ValueError("no polygons and no run lengths")
    return [part for part in parts if not isinstance(part, list) or len(part) not in (2, 4)] or parts


def decode_runs(part: dict, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool from ``{"size": [h, w], "counts": …}``: runs of zeros and ones in turn, down the columns."""
    counts = run_lengths(part, size)
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(size[::-1]).T)


def run_lengths(part: dict, size: tuple[int, int]) -> list[int]:
    if part.get("size") != list(size):
        raise ValueError(f"run lengths of size {str(part.get('size'))[:40]}, the picture has {list(size)}")
    counts = part.get("counts")
    if isinstance(counts, str | bytes):
        counts = decompress(counts.encode("ascii") if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError("counts are no list of run lengths")
    height, width = size
    if sum(counts) != height * width:
        raise ValueError(f"the run lengths do not add up to {height} x {width} pixels")
    return counts


def decompress(text: bytes) -> list[int]:
    """COCO's compressed counts: five bits a character, low bits first; from the fourth on, the change to two before."""
    counts: list[int] = []
    value = shift = 0
    for byte in text:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("the compressed run lengths hold a foreign character")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more characters follow
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the compressed run lengths end within a number")
    return counts


def fill_polygon(part: Any, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool from the corners ``[x0, y0, x1, y1, …]``."""
    check_polygon(part, size)
    runs = polygons().frPyObjects([part], *size)[0]
    return decode_runs({"size": list(size), "counts": runs["counts"]}, size)


def polygons() -> Any:
    return need_extra("pycocotools.mask", "coco", "a mask that is a polygon")


def check_polygon(part: Any, size: tuple[int, int]) -> None:
    polygons()
    numbers: Sequence = part if isinstance(part, list) else ()
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError("a polygon needs the x and y of at least three corners")
    limit = FAR * max(size)
    if not all(type(number) in (int, float) and abs(number) <= limit for number in numbers):
        raise ValueError("a polygon's corner is no number or far outside of the picture")
