"""Pictures from a folder that others filled: every kind becomes plain RGB, every trap a DataError.

Paths come from annotation files, so they are held to stay under the data's folder; the header's size is checked
before anything is decoded, so that a small file cannot fill the memory. What cannot be read is skipped within a
budget, counted and named.
"""

import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mitrain.errors import DataError

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that runs another program
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
NAMED = 5  # bad samples that the final message names; the log names all

log = logging.getLogger(__name__)


class BadSamples:
    """Counts distinct bad samples, and stops the run with DataError when there are more than ``budget``."""

    def __init__(self, budget: int):
        self.budget = budget
        self.reasons: dict[str, str] = {}  # name of the sample → what is wrong with it

    def __len__(self) -> int:
        return len(self.reasons)

    def skip(self, name: str, reason: str) -> None:
        """Note a bad sample; the same one may come again in every epoch and counts once."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        log.warning("skipped %s (%d of at most %d): %s", name, len(self), self.budget, reason)
        if len(self) > self.budget:
            raise DataError(
                f"{len(self)} bad samples, more than data.bad_samples={self.budget}: {self.summary()} "
                "- mend or remove them, or raise the budget"
            )

    def summary(self) -> str:
        first = [f"{name} ({reason})" for name, reason in list(self.reasons.items())[:NAMED]]
        more = len(self) - len(first)
        return "; ".join(first) + (f"; and {more} more" if more else "")


def open_image(root: Path, relative: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture ``root/relative`` as RGB: first frame, upright by its EXIF tag, transparency on white.

    Raises DataError, naming the file, where the path leaves ``root`` (through a link too), the file is missing or no
    readable picture, or it holds more than ``max_pixels`` pixels.
    """
    path = contained(root, relative)
    try:
        # a damaged EXIF block is only warned of: the picture is read without it
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return as_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a decoder may raise anything when the file is torn or hostile
        raise DataError(f"{relative!r} in {str(root)!r} is not a readable picture ({error}): replace it") from None
    raise DataError(
        f"{relative!r} in {str(root)!r} has {width} x {height} pixels, {max_pixels} are allowed: scale it down"
    )


def contained(root: Path, relative: str) -> Path:
    """The file ``relative`` as an absolute path, if it is one and lies under ``root`` once all links are followed."""
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise DataError(f"{str(relative)[:80]!r} is not a path of a picture in {str(root)!r}: correct the annotation")
    try:
        folder = Path(root).resolve()
        path = (folder / relative).resolve()
        inside, there = path.is_relative_to(folder), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a ring of links, a lone surrogate
        raise DataError(f"{relative[:80]!r} in {str(root)!r} cannot be opened ({error}): correct the path") from None
    if not inside:
        raise DataError(f"{relative[:200]!r} leads out of the data folder {str(root)!r}: give paths below it")
    if not there:
        raise DataError(f"no picture {relative[:200]!r} in {str(root)!r}: put it there or correct the path")
    return path


def as_rgb(image: Image.Image) -> Image.Image:
    """Any mode of PIL → RGB; transparent pixels become white."""
    if image.mode in SIXTEEN_BIT:
        image = eight_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed scale")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def eight_bit(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits → 8 bits (PIL's own conversion would clip them)."""
    values = np.asarray(image).astype(np.int64)
    if image.mode == "I" and values.max(initial=0) <= 255:
        return image.convert("L")
    if values.max(initial=0) >= 1 << 16:
        raise ValueError("grey values of 32 bits have no agreed scale")
    return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
