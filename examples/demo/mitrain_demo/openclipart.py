"""The data set ``openclipart``: drawings in the public domain with their authors' titles and keywords.

For multi-label classification (drawing and title → keywords) and for retrieval (drawing ⇄ title). The titles and keywords
stand in the SVG files of one Debian package, the pictures in another. Keywords that few drawings or few authors use are
left out, and folders of icons, ornaments, maps and signs. Variants of a drawing stay in one split.
"""

import gzip
import html
import io
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic
from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain_demo.deb import members
from mitrain_demo.pairs import write_karpathy, write_splits, write_summary
from mitrain_demo.splits import split_groups
from mitrain_demo.stamps import VISIBLE, cut_out
from mitrain_demo.tuxpaint import on_plain_ground

NAME = "openclipart"
LEFT_OUT = ("computer/", "shapes/", "signs_and_symbols/", "geography/", "special/", "logos/", "buttons/")
SERIES = ("recreation/games/cards/", "recreation/games/chess/")  # hundreds of drawings alike
SAME = {"transportation": "transport", "tools": "tool", "desserts": "dessert", "sport": "sports", "animals": "animal"}
MEANINGLESS = {"", "hash", "unsorted", "shape", "symbol", "cartoon", "white", "black", "public domain", "clip art"}
DRAWINGS, AUTHORS = 25, 8  # that a keyword needs
LONGEST = 256  # pixels of the longer side
MAX_SVG = 64 << 20  # bytes of an unpacked drawing
BLURB = re.compile(r"<rdf:RDF.*?</rdf:RDF>", re.S)

README = """Open Clip Art Library drawings with titles and keywords, made by mitrain from the Debian packages openclipart-svg
and openclipart-png.

Drawings, titles and keywords: the contributors of the Open Clip Art Library, public domain (see COPYRIGHT). Cropped,
scaled down and put on a plain ground. The splits are drawn from a seed.

{split}.jsonl: one drawing a line: id, image, text (the title), label (keywords), object (a group of variants).
dataset_openclipart.json: the same for retrieval, in the layout of Karpathy's dataset_*.json.
summary.json: counts.
"""


@dataclass(frozen=True)
class Drawing:
    """What its author wrote about a drawing; ``path`` is below the packages' folder, without a suffix."""

    path: str
    title: str
    keywords: frozenset[str]
    author: str


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian packages -svg and -png, in this order. Raises PrepareError."""
    if len(archives) != 2:
        raise PrepareError("openclipart is made from two packages, openclipart-svg and -png: leave --archive out")
    drawings = {d.path: d for d in read_drawings(archives[0])}
    known = common_keywords(list(drawings.values()))
    wanted = {path: d for path, d in drawings.items() if d.keywords & known}
    pictures = dict(tqdm(read_pictures(archives[1], wanted), "openclipart", unit=" drawings", disable=None))
    if len(known) < 2 or len(pictures) < 10:
        raise PrepareError(f"{archives[0].name} and {archives[1].name} hold too few titled drawings: get the originals")
    kept = [wanted[path] for path in sorted(pictures)]
    groups = grouped(kept, [pictures[d.path] for d in kept])
    splits = split_groups(groups, f"{NAME} {seed}")
    rows: dict[str, list[dict]] = {split: [] for split in ("train", "val", "test")}
    for drawing, group, split in zip(kept, groups, splits, strict=True):
        rows[split].append(record(drawing, known, kept[group].path))
        path = target / "images" / f"{drawing.path}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[drawing.path].save(path)
    write_atomic(target / "README.txt", README)
    found = dict(members(archives[0], "usr/share/doc/openclipart-svg", ("copyright",)))
    write_atomic(target / "COPYRIGHT", found.get("copyright", b"").decode("utf-8", "replace"))
    write_splits(target, rows)
    write_karpathy(target, NAME, rows)
    write_summary(target, rows)


def record(drawing: Drawing, known: set[str], group: str) -> dict:
    return {
        "id": drawing.path,
        "image": f"images/{drawing.path}.png",
        "text": drawing.title,
        "label": sorted(drawing.keywords & known),
        "object": group,
    }


def grouped(drawings: Sequence[Drawing], pictures: Sequence[Image.Image]) -> list[int]:
    """The group of each drawing: nearly the same picture, the same title but for numbers, or a numbered file name."""
    pairs = near_pairs(np.stack([fingerprint(picture) for picture in pictures]))
    titles = [re.sub(r"[\W\d_]+", " ", d.title.casefold()).strip() for d in drawings]
    names = [re.sub(r"[\d_-]+$", "", d.path) for d in drawings]
    return merged(len(drawings), pairs, titles, names)


def common_keywords(drawings: Sequence[Drawing]) -> set[str]:
    """Keywords that enough drawings of enough authors have."""
    counts = Counter(keyword for d in drawings for keyword in d.keywords)
    authors: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        for keyword in drawing.keywords:
            authors[keyword].add(drawing.author)
    return {k for k, n in counts.items() if n >= DRAWINGS and len(authors[k]) >= AUTHORS}


# the packages


def read_drawings(archive: Path, left_out: tuple[str, ...] = (*LEFT_OUT, *SERIES)) -> Iterator[Drawing]:
    """Every titled drawing of the package openclipart-svg that is not left out, in the order of their paths."""
    found = {}
    for path, content in members(archive, "usr/share/openclipart/svg", (".svg", ".svgz")):
        if not path.startswith(left_out):
            drawing = read_blurb(path.rpartition(".")[0], content)
            if drawing.title and drawing.keywords:
                found[drawing.path] = drawing
    yield from (found[path] for path in sorted(found))


def read_blurb(path: str, content: bytes) -> Drawing:
    """Title, keywords and author of an SVG file (packed or not); empty where it has none."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_SVG)
        except (OSError, EOFError, zlib.error):
            content = b""
    match = BLURB.search(content.decode("utf-8", "replace"))
    blurb = match[0] if match else ""
    subject = inside(blurb, "dc:subject")
    words = {plain(word).casefold() for word in re.findall(r"<rdf:li>(.*?)</rdf:li>", subject, re.S)}
    keywords = frozenset(SAME.get(word, word) for word in words) - MEANINGLESS
    before_author = blurb.partition("<dc:publisher>")[0]
    return Drawing(path, plain(inside(before_author, "dc:title")), keywords, plain(inside(blurb, "dc:creator")))


def inside(text: str, tag: str) -> str:
    """What stands in the first element ``tag``."""
    return text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]


def plain(text: str) -> str:
    """Text without tags and with single spaces."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def read_pictures(archive: Path, wanted: Mapping[str, Drawing]) -> Iterator[tuple[str, Image.Image]]:
    """(path, picture on a plain ground) of the ``wanted`` drawings of the package openclipart-png; unreadable and empty
    ones are passed over."""
    for name, content in members(archive, "usr/share/openclipart/png", (".png",)):
        path = name.removesuffix(".png")
        if path not in wanted:
            continue
        try:
            image = cut_out(name, content)
        except PrepareError:
            continue
        if image.getchannel("A").getextrema()[1] >= VISIBLE:
            image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
            yield path, on_plain_ground(image)
