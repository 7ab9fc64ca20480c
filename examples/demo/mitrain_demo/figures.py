"""The data sets ``gimp-help`` and ``games``: figures of a manual with their captions, and games' pictures with their genres.

``gimp-help``: the figures of GIMP's English manual, mostly dialogs and examples of filters, for captions and retrieval.
``games``: thumbnails of Debian's games, each with apt's description and its ``game::`` tags, for several labels. Pages and
nearly equal pictures stay in one split.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic
from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain_demo.deb import members
from mitrain_demo.pairs import write_karpathy, write_splits, write_summary
from mitrain_demo.splits import split_groups

HELP = "usr/share/gimp/2.0/help/en"
THUMBNAILS = "usr/share/games/thumbnails"
XHTML = "{http://www.w3.org/1999/xhtml}"
WORDS = 3  # that a caption below a figure's title has more than
GAMES = 10  # of a genre

HELP_README = """Figures of the GIMP User Manual with their captions, made by mitrain from the Debian package gimp-help-en.

Pictures and texts: the GIMP Documentation Team, GFDL-1.2 or later without invariant sections (see COPYRIGHT). The splits are
drawn from a seed.

{split}.jsonl: one caption a line: id, image, text, object (the page). summary.json: counts.
dataset_gimp-help.json: the same for retrieval, in the layout of Karpathy's dataset_*.json.
"""
GAMES_README = """Pictures of games with their descriptions and genres, made by mitrain from the Debian package
games-thumbnails and the descriptions and debtags that apt knows.

Every picture is under its own game's licence (see the copyright file of the package that it is named by). The splits are
drawn from a seed.

{split}.jsonl: one game a line: id (the package), image, text (the description), label (genres), object.
summary.json: counts.
"""
Row = dict[str, object]


def build_help(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from gimp-help-en and gimp-help-common, in this order. Raises PrepareError."""
    if len(archives) != 2:
        raise PrepareError("gimp-help is made from two packages, gimp-help-en and gimp-help-common: leave --archive out")
    files = dict(members(archives[0], HELP, (".html", ".png", ".jpg")))
    rows = list(figures(files, archives[0]))
    keys = [[str(row[key]) for row in rows] for key in ("object", "image", "text")]
    write(rows, files, target, keys, f"gimp-help {seed}", HELP_README, archives[1], "usr/share/doc/gimp-help-common")


def build_games(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from games-thumbnails and apt's records, in this order. Raises PrepareError."""
    if len(archives) != 2:
        raise PrepareError("games is made from a package and apt's records: leave --archive out")
    files = {f"images/{path}": content for path, content in members(archives[0], THUMBNAILS, (".png",))}
    known = records(archives[1].read_text("utf-8", "replace"))
    rows = [
        {"id": name, "image": image, "text": known[name][0], "label": known[name][1], "object": name}
        for image, name in sorted((image, Path(image).stem) for image in files)
        if name in known
    ]
    counts = Counter(genre for row in rows for genre in row["label"])
    rows = [row | {"label": [g for g in row["label"] if counts[g] >= GAMES]} for row in rows]
    rows = [row for row in rows if row["label"]]
    keys = [[str(row["text"]) for row in rows]]
    write(rows, files, target, keys, f"games {seed}", GAMES_README, archives[0], "usr/share/doc/games-thumbnails")


def write(
    rows: Sequence[Row],
    files: Mapping[str, bytes],
    target: Path,
    keys: Sequence[Sequence[str]],
    seed: str,
    readme: str,
    package: Path,
    documents: str,
) -> None:
    """Tables, pictures and texts of ``rows``, split by groups: nearly one picture, or an equal one of the ``keys``."""
    if len(rows) < 10:
        raise PrepareError(f"{str(package)!r} gives {len(rows)} pictures with texts: get the original packages")
    prints = {image: print_of(image, files[image]) for image in {str(row["image"]) for row in rows}}
    pairs = near_pairs(np.stack([prints[str(row["image"])] for row in rows]))
    splits = split_groups(merged(len(rows), pairs, *keys), seed)
    parts = {s: [row for row, own in zip(rows, splits, strict=True) if own == s] for s in ("train", "val", "test")}
    for image in prints:
        path = target / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[image])
    write_atomic(target / "README.txt", readme)
    licence = dict(members(package, documents, ("copyright",))).get("copyright", b"")
    write_atomic(target / "COPYRIGHT", licence.decode("utf-8", "replace"))
    write_splits(target, parts)
    write_karpathy(target, seed.partition(" ")[0], parts)
    write_summary(target, parts)


def print_of(name: str, content: bytes) -> np.ndarray:
    """(F,) a picture's fingerprint. PrepareError where it cannot be read."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            return fingerprint(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PrepareError(f"{name} is no readable picture ({error}): get the original package") from None


# the manual


def figures(files: Mapping[str, bytes], archive: Path) -> Iterator[Row]:
    """Each caption of a picture: a figure's title and what stands below it, or both for each of its several pictures."""
    for page in sorted(path for path in files if path.endswith(".html")):
        try:
            root = ET.fromstring(files[page])
        except ET.ParseError as error:
            raise PrepareError(f"{str(archive)!r}: {page} is no XHTML ({error}): get the original package") from None
        found = [d for d in root.iter(f"{XHTML}div") if d.get("class") == "figure"]
        said = [(image, text) for figure in found for image, text in captions(figure) if image in files]
        for number, (image, text) in enumerate(dict.fromkeys(said)):
            yield {"id": f"{page.removesuffix('.html')}#{number}", "image": image, "text": text, "object": page}


def captions(figure: ET.Element) -> Iterator[tuple[str, str]]:
    """(picture, caption): of several pictures those that have one of their own and are not the picture before the change."""
    title = figure.find(f"{XHTML}p[@class='title']")
    head = re.sub(r"^Figure [A-Z0-9.]+ ", "", words(title)) if title is not None else ""
    images = [str(image.get("src")) for image in figure.iter(f"{XHTML}img")]
    below = [words(d) for d in figure.iter(f"{XHTML}div") if d.get("class") == "caption"]
    if len(images) == 1 and head:
        yield images[0], head
        yield from ((images[0], text) for text in below if len(text.split()) > WORDS)
    elif len(images) == len(below) and head:
        for image, text in zip(images, below, strict=True):
            if text and not text.casefold().startswith("original"):
                yield image, f"{head}: {text}"


def words(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


# the games


def records(text: str) -> dict[str, tuple[str, list[str]]]:
    """package → its description and genres, from apt's records, one a paragraph; those without either are left out."""
    found = {}
    for paragraph in re.split(r"\n\s*\n", re.sub(r"\n[ \t]+(?!\.)", " ", text)):
        fields = dict(re.findall(r"^([\w-]+): *(.*)$", paragraph, re.M))
        said = fields.get("Description-en") or fields.get("Description") or ""
        genres = sorted({g.rpartition(":")[2] for g in re.findall(r"game::([\w:-]+)", fields.get("Tag", ""))} - {"TODO"})
        if said and genres and "Package" in fields:
            found.setdefault(fields["Package"], (said, genres))
    return found
