"""The data set ``tuxpaint-spoken``: stamps with what people say of them, in eleven languages: image, speech and text.

For retrieval between any two of the three. A stamp's recordings stay in one split, and so do all of one kind of object.
Which and how many people speak a language is not known.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mitrain.core.errors import PrepareError
from mitrain_demo.captions import grouped
from mitrain_demo.deb import members
from mitrain_demo.pairs import write_splits, write_summary
from mitrain_demo.stamps import CATEGORIES, ROOT, Stamp, read_stamps
from mitrain_demo.tuxpaint import SHARES, image_path, on_plain_ground, split_kinds, write_texts

SPOKEN = re.compile(r"_desc(?:_([A-Za-z_]+))?\.ogg$")

README = """Tux Paint stamps with spoken and written captions, made by mitrain from the Debian package
tuxpaint-stamps-default.

Pictures, recordings and captions: the Tux Paint contributors, GPL-2 as a whole (see COPYRIGHT). Pictures cropped, scaled
down and put on a plain ground; captions and recordings as they are. The splits are drawn from a seed.

{split}.jsonl: one recording a line: id, image, speech, text (what is said), language, label (the category), object.
summary.json: counts.
"""


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian package ``archives[0]``. Raises PrepareError."""
    collection = read_stamps(archives[0])
    pictures = [on_plain_ground(stamp.image) for stamp in collection.stamps]
    stamps = {stamp.path.removesuffix(".png"): stamp for stamp in grouped(collection.stamps, pictures)}
    splits = split_kinds(list(stamps.values()), seed)
    write_texts(collection, target, README)
    said: dict[str, dict[str, str]] = {}
    clips: dict[str, str] = {}
    for path, content in members(archives[0], f"usr/share/{ROOT.strip('/')}", (".txt", ".ogg")):
        spoken = SPOKEN.search(path)
        if path.endswith(".txt") and path.removesuffix(".txt") in stamps:
            said[path.removesuffix(".txt")] = translations(content.decode("utf-8", "replace"))
        elif spoken and path[: spoken.start()] in stamps:
            clips[path] = spoken[1] or "en"
            file = target / "speech" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    rows = sorted(recordings(stamps, said, clips), key=lambda row: row["id"])
    if not rows:
        raise PrepareError(f"{str(archives[0])!r} holds no spoken captions: give the package tuxpaint-stamps-default")
    parts = {split: [row for row in rows if splits[row["object"]] == split] for split in SHARES}
    heard, shown = {row["speech"] for row in rows}, {row["image"] for row in rows}
    for path in clips:
        if f"speech/{path}" not in heard:
            (target / "speech" / path).unlink()
    for stamp, picture in zip(collection.stamps, pictures, strict=True):
        if image_path(stamp) in shown:
            path = target / image_path(stamp)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    write_splits(target, parts)
    write_summary(target, parts)


def translations(text: str) -> dict[str, str]:
    """language → caption: the first line is English, "fr.utf8=Un corbeau." is French."""
    first, *others = text.splitlines() or [""]
    found = (line.partition(".utf8=") for line in others)
    return {"en": first.strip()} | {language.strip(): said.strip() for language, _, said in found}


def recordings(
    stamps: Mapping[str, Stamp], said: Mapping[str, Mapping[str, str]], clips: Mapping[str, str]
) -> Iterator[dict[str, str]]:
    """A record of each recording whose words are written in its language."""
    for path, language in clips.items():
        name = path[: SPOKEN.search(path).start()]
        text = said.get(name, {}).get(language, "")
        if text:
            files = {"image": image_path(stamps[name]), "speech": f"speech/{path}"}
            label = {"label": CATEGORIES[stamps[name].category][0], "object": stamps[name].kind}
            yield {"id": f"{name}@{language}", **files, "text": text, "language": language, **label}
