"""Debian packages of a few kilobytes, among them one laid out like Tux Paint's stamps."""

import gzip
import io
import lzma
import tarfile
from pathlib import Path

import zstandard
from PIL import Image, ImageDraw

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
STAMPS = "./usr/share/tuxpaint/stamps/"
THINGS = {
    "animals": "crow otter zebra yak badger ibex",
    "clothes": "glove scarf sock tunic",
    "food": "plum mango pizza bagel leek",
    "hobbies": "cello drum banjo",
    "household": "mug kettle ladle saw",
    "medical": "splint tooth vial",
    "military": "tank helm cannon",
    "people": "pirate sailor clown",
    "plants": "fern tulip maple",
    "seasonal": "wreath candle sled",
    "space": "moon comet probe",
    "sports": "bat oar puck",
    "town": "kiosk tower bridge",
    "vehicles": "tram canoe truck",
}


def ar(members: dict[str, bytes]) -> bytes:
    """An ar archive, as in man 5 ar."""
    parts = [b"!<arch>\n"]
    for name, data in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
        parts += [header.encode(), data, b"\n" * (len(data) % 2)]
    return b"".join(parts)


def tar(files: dict[str, bytes], extra: list[tarfile.TarInfo] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for entry in extra:
            archive.addfile(entry)
    return buffer.getvalue()


def deb(path: Path, files: dict[str, bytes], suffix: str = ".xz", extra: list[tarfile.TarInfo] = ()) -> Path:
    data = COMPRESS[suffix](tar(files, extra))
    path.write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.gz": b"odd", f"data.tar{suffix}": data}))
    return path


def stamp(number: int, size: int = 64) -> bytes:
    """A PNG with a coloured shape of its own on transparent ground."""
    image = Image.new("RGBA", (size + 8, size + 4))
    colour = (40 + 37 * number % 200, 30 + 91 * number % 200, 20 + 53 * number % 200, 255)
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 2, size, size - number % 9), fill=colour)
    draw.rectangle((size // 3, size // 3, size // 2 + number % 7, size - 12), fill=(*colour[2::-1], 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def stamps_files() -> dict[str, bytes]:
    """Stamps of all fourteen categories, cartoons, variants of one thing, and files that are none."""
    files = {"./usr/share/doc/tuxpaint-stamps-default/copyright": b"License: GPL-2\n"}
    number = 0
    for folder, words in THINGS.items():
        for kind, name in [(kind, name) for kind in ("", "cartoon/") for name in words.split()]:
            number += 1
            article = "An" if name[0] in "aeiou" else "A"
            path = f"{STAMPS}{folder}/{kind}{name}"
            files[path + ".png"] = stamp(number)
            files[path + ".txt"] = f"{article} {name}.\nfr.utf8=Un {name}.\n".encode()
    files |= {
        f"{STAMPS}animals/crow2.png": stamp(900),
        f"{STAMPS}animals/crow2.txt": "A big “black” crow, from afar.\n".encode(),
        f"{STAMPS}animals/crow_mirror.png": stamp(901),
        f"{STAMPS}food/plums.png": stamp(902),
        f"{STAMPS}food/plums.txt": b"A pair of plums!\n",
        f"{STAMPS}symbols/a.png": stamp(903),
        f"{STAMPS}symbols/a.txt": b"The letter a.\n",
        f"{STAMPS}food/loaf.svg": b"<svg/>",
        f"{STAMPS}food/loaf.txt": b"A loaf.\n",
    }
    return files


def stamps_deb(path: Path) -> Path:
    return deb(path, stamps_files())
