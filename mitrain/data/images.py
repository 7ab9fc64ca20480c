"""Pictures from a folder that others filled: every kind becomes plain RGB, every trap a DataError.

The header's size is checked before anything is decoded, so that a small file cannot fill the memory. What cannot be read is
skipped within a budget, counted and named.
"""

import hashlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mitrain.core.errors import DataError
from mitrain.data.contents import read_content
from mitrain.data.kinds import CONVERT, FORMATS, kind_of

MAX_PIXELS = 50_000_000
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the EXIF tag's value
SIDEWAYS = tuple(TURNS[tag] for tag in (5, 6, 7, 8))  # these exchange width and height

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a file without its content: of a picture, of its first frame.

    ``digest``: sha256 of the very bytes that were decoded. ``stored_size``: width and height in the file; of other files
    what limits are held to, see their kinds. ``turn``: what a picture's EXIF tag asks for, none where the tag is damaged.
    ``where``: the file in messages. ``note``: how an annotation of another size was brought together with it.
    """

    digest: str
    stored_size: tuple[int, int]
    turn: Image.Transpose | None = None
    where: str
    note: str = ""

    def facts(self) -> "Facts":
        """The same without the content."""
        return Facts(**{field.name: getattr(self, field.name) for field in fields(Facts)})

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded content: 4 for each pixel or number."""
        return 4 * self.stored_size[0] * self.stored_size[1]

    def content(self) -> Any:
        """What encoders are given: of a picture its pixels, else itself."""
        return self

    def annotated(self, size: Size, max_pixels: int = MAX_PIXELS) -> Self:
        """The picture as an annotation of ``size`` means it: of this size, or evenly scaled.

        That is the upright one, or the stored one where only this has the annotation's proportions. Raises DataError
        where neither has, and where a turned picture has them either way: then nobody can know which one was annotated.
        """
        upright = self.stored_size[::-1] if self.turn in SIDEWAYS else self.stored_size
        stands, lies = likeness(upright, size), likeness(self.stored_size, size)
        sizes = f"{upright[0]} x {upright[1]} pixels, its annotation is made for {size[1]} x {size[0]}"
        if not max(stands, lies):
            raise DataError(f"{self.where} has {sizes}: get matching files")
        if size[0] * size[1] > max_pixels:
            raise DataError(f"{self.where} has {sizes}, {max_pixels} pixels are allowed: scale both down")
        if self.turn is not None and stands == lies:
            raise DataError(
                f"{self.where} is turned by its EXIF tag, and its annotation fits it turned and unturned: "
                "save the picture upright, without the tag"
            )
        scaled = "as a scaled copy of what was annotated" if max(stands, lies) == 1 else ""
        if stands >= lies:
            return replace(self, note=scaled)
        note = " and ".join(filter(None, ["as it is stored, not turned as its EXIF tag says", scaled]))
        return replace(self, digest=f"{self.digest}-as-stored", turn=None, note=note)


@dataclass(frozen=True, kw_only=True)
class Decoded(Facts):
    """A picture file's first frame as it is ``stored``, in RGB."""

    stored: Image.Image

    def content(self) -> Image.Image:
        """What encoders are given: the picture `upright`."""
        return self.upright()

    def upright(self) -> Image.Image:
        """Turned as its EXIF tag says."""
        return self.stored if self.turn is None else self.stored.transpose(self.turn)


def likeness(of: tuple[int, int], size: Size) -> int:
    """How a picture of width and height ``of`` fits ``size``. 2: exactly. 1: evenly scaled, to less than a pixel. 0: not."""
    height, width = size
    if of == (width, height):
        return 2
    return int(abs(of[0] * height - of[1] * width) < max(height, width))


def open_image(root: Path, relative: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture ``root/relative`` as RGB: first frame, upright by its EXIF tag, transparency on white.

    Raises DataError, naming the file, where the path leads out of ``root``, the file is missing or no readable picture,
    or it holds more than ``max_pixels`` pixels.
    """
    return read_image(root, relative, max_pixels).upright()


def annotated_image(root: Path, relative: str, size: Size, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture that an annotation of ``size`` was made on, scaled to that size; DataError as of `open_image`."""
    return to_size(read_image(root, relative, max_pixels).annotated(size, max_pixels).upright(), size)


def to_size(picture: Image.Image, size: Size) -> Image.Image:
    """The picture scaled to its annotation's ``size``."""
    return picture if picture.size == size[::-1] else picture.resize(size[::-1], Image.Resampling.BICUBIC)


def read_image(root: Path, relative: str, max_pixels: int = MAX_PIXELS) -> Decoded:
    """The picture ``root/relative`` as it is stored; DataError as of `open_image`. The file is read once."""
    content, where = read_content(root, relative)
    try:
        with quiet(), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                image.load()  # the pixels first: what is wrong with the EXIF block is no reason to refuse them
                turn = orientation(image)
                mend_transparency(image, content)
                digest = hashlib.sha256(content).hexdigest()
                return Decoded(digest=digest, stored_size=(width, height), turn=turn, where=where, stored=as_rgb(image))
    except UnidentifiedImageError:
        what = kind_of(content)
        why = f"it is {what}" if what else "its content is of no kind that is known"
        raise DataError(f"{where} is not a readable picture ({why}): {CONVERT}") from None
    except Exception as error:  # a decoder may raise anything when the file is torn or hostile
        raise DataError(f"{where} is not a readable picture ({error}): replace it") from None
    raise DataError(f"{where} has {width} x {height} pixels, {max_pixels} are allowed: scale it down")


class Hush:
    """How many threads decode just now, and what ends their silence."""

    lock, users, ends = threading.Lock(), 0, None


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is warned of: a damaged EXIF block, for one, says no word and the picture is read without it.

    Python keeps one list of filters for all threads. The first to come hides it and the last to go puts it back, as two
    that each put back what they found would leave the other's silence behind.
    """
    with Hush.lock:
        if not Hush.users:
            Hush.ends = warnings.catch_warnings(action="ignore")
            Hush.ends.__enter__()
        Hush.users += 1
    try:
        yield
    finally:
        with Hush.lock:
            Hush.users -= 1
            if not Hush.users:
                Hush.ends.__exit__()


def orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # PIL raises whatever the block's damage leads to, and other things for other formats
        return None


def mend_transparency(image: Image.Image, content: bytes) -> None:
    """Bring the transparent colour of a PNG to the scale of its pixels, which PIL decodes to 8 bits."""
    clear = image.info.get("transparency")
    if image.format != "PNG" or clear is None:
        return
    depth = content[24]
    if image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif image.mode == "L" and depth < 8:
        image.info["transparency"] = clear * 255 // ((1 << depth) - 1)


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
    """Grey values of 16 bits → 8 bits (PIL's own conversion would clip them), with opacity where a value is transparent."""
    values, clear = np.asarray(image).astype(np.int64), image.info.get("transparency")
    if values.max(initial=0) >= 1 << 16:
        raise ValueError("grey values of 32 bits have no agreed scale")
    shift = 0 if image.mode == "I" and values.max(initial=0) <= 255 else 8
    grey = Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8))
    if clear is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
