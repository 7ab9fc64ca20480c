"""What a file is, by its first bytes: so that a message about a picture that is none can say what came instead."""

from PIL import features

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM") + (("AVIF",) if features.check("avif") else ())
READ = "JPEG, PNG, WebP, BMP, GIF, TIFF, PPM" + (", AVIF" if "AVIF" in FORMATS else "")  # none runs another program
CONVERT = f"convert it, {READ} are read"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MEDIA = "a video or sound"
LFS_POINTER = b"version https://git-lfs"

STARTS = {
    b"\xff\xd8": "a damaged JPEG picture",
    b"\x89PNG": "a damaged PNG picture",
    b"GIF8": "a damaged GIF picture",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 picture",
    b"\xff\x4f\xff\x51": "a JPEG 2000 picture",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"\0\0\1\0": "an icon",
    b"\x1a\x45\xdf\xa3": MEDIA,
    b"RIFF": MEDIA,
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
}


def kind_of(content: bytes) -> str:
    """In words what a file that holds ``content`` is; "" where its start says nothing."""
    if not content:
        return "an empty file"
    if content.startswith(LFS_POINTER):
        return "a Git LFS pointer to a file that was not fetched"
    for start, kind in STARTS.items():
        if content.startswith(start):
            return kind
    if content[4:8] == b"ftyp":
        brand = content[8:12]
        if brand in (b"avif", b"avis"):
            return "an AVIF picture" if "AVIF" not in FORMATS else "a damaged AVIF picture"
        return "a HEIC picture" if brand in HEIF_BRANDS else MEDIA
    return kind_of_text(content[:1024])


def kind_of_text(start: bytes) -> str:
    text = start.lower()
    for mark, kind in ((b"<svg", "an SVG drawing"), (b"<!doctype html", "an HTML page"), (b"<html", "an HTML page")):
        if mark in text:
            return kind
    return "an XML document" if text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<?xml") else ""


SUFFIXES = {
    "image": ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .avif",
    "audio": ".wav .flac .ogg .oga .opus .mp3 .m4a .aac .aif .aiff .au .caf",
    "video": ".mp4 .mkv .webm .mov .avi .mpg .mpeg .m4v .ts",
    "features": ".npy .npz .safetensors",
    "text": ".txt",
}
BY_ENDING = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes.split()}
"""By the end of a file's name, what an encoder of it takes."""
