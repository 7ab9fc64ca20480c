"""Contact sheets of predictions, drawn with Pillow alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RIGHT, WRONG, INK, PAPER = (20, 120, 40), (180, 30, 30), (30, 30, 30), (255, 255, 255)
TINT, OUTLINE = (255, 40, 40), (30, 90, 255)
LINE = 15


@dataclass(frozen=True)
class Panel:
    """One cell of a sheet: a picture, lines of text below it, and whether it went right (None: neither)."""

    picture: Image.Image
    lines: Sequence[str]
    right: bool | None = None


def card(lines: Sequence[str], side: int = 200) -> Image.Image:
    """A square with ``lines``, for what cannot be seen."""
    picture = Image.new("RGB", (side, side), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for number, line in enumerate(lines):
        draw.text((6, 6 + LINE * number), shorten(line, font, side - 12), fill=INK, font=font)
    return picture


def overlay(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with ``mask`` (H, W) tinted red and everything else paled."""
    pixels = np.asarray(picture, dtype=np.float32)
    tinted = 0.5 * pixels + 0.5 * np.float32(TINT)
    return Image.fromarray(np.where(mask[..., None], tinted, 0.75 * pixels + 40).clip(0, 255).astype(np.uint8))


def outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with the border of ``mask`` (H, W) drawn in blue."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels = np.asarray(picture).copy()
    pixels[mask & ~inner] = OUTLINE
    return Image.fromarray(pixels)


def sheet(panels: Sequence[Panel], columns: int = 4, side: int = 200) -> Image.Image:
    """Panels in rows, each picture fitted into a square of ``side`` pixels."""
    text_height = LINE * max((len(p.lines) for p in panels), default=0) + 8
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + text_height + 8) + 8), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for i, panel in enumerate(panels):
        x, y = 8 + i % columns * (side + 8), 8 + i // columns * (side + text_height + 8)
        picture = panel.picture.convert("RGB")
        scale = side / max(picture.size)
        picture = picture.resize([max(1, round(s * scale)) for s in picture.size], Image.Resampling.BICUBIC)
        canvas.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
        ink = INK if panel.right is None else RIGHT if panel.right else WRONG
        for j, line in enumerate(panel.lines):
            draw.text((x, y + side + 4 + j * LINE), shorten(line, font, side), fill=ink, font=font)
    return canvas


def shorten(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """``line``, cut to ``width`` pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
