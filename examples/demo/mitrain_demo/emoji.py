"""The data set ``emoji``: the emoji of two vendors with CLDR's English names; one vendor is held out.

Training and validation show Noto's drawings (Google). ``test``: Twemoji's drawings (Twitter) of things that training has
in no drawing; ``test_vendor``: Twemoji's drawings of things that training knows from Noto, drawn otherwise. Skin tones,
flags, symbols and components are left out. Proprietary art is not touched.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic
from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain_demo.npm import package_file, package_files
from mitrain_demo.pairs import write_karpathy, write_splits, write_summary
from mitrain_demo.splits import split_groups
from mitrain_demo.stamps import cut_out
from mitrain_demo.tuxpaint import on_plain_ground

NAME = "emoji"
VENDORS = ("google", "twitter")  # training's, and the one held out
LEFT_OUT = {"Flags", "Symbols", "Component"}
CATEGORIES = {
    "Activities": "activities",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Objects": "objects",
    "People & Body": "people",
    "Smileys & Emotion": "smileys",
    "Travel & Places": "places",
}
# people drawn as man, woman or person are one thing
PERSON = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|child|mrs\.?|mr\.?|mx|prince|princess|adult)\b")

README = """Emoji of two vendors with their English names, made by mitrain from the npm packages emoji-datasource-google,
emoji-datasource-twitter and cldr-annotations-full.

Noto Emoji: Google, Apache-2.0 (art) and OFL-1.1 (font). Twemoji: Twitter and contributors, CC-BY-4.0. Names: Unicode CLDR,
Unicode-3.0. The drawings are put on a plain ground. The splits are drawn from a seed.

{split}.jsonl: one drawing a line: id, image, text (the name), label (the category), object (a group of variants).
dataset_emoji.json: the same for retrieval, in the layout of Karpathy's dataset_*.json, without test_vendor.
summary.json: counts.
"""


@dataclass(frozen=True)
class Emoji:
    """An emoji that both vendors draw. ``pictures``: RGBA by vendor; ``group``: a finer category, as animal-mammal;
    ``words``: CLDR's keywords."""

    code: str
    name: str
    category: str
    group: str
    words: tuple[str, ...]
    pictures: dict[str, Image.Image]


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the two vendors' packages and CLDR's, in this order. Raises PrepareError."""
    if len(archives) != 3:
        raise PrepareError("emoji is made from three packages, two vendors' and CLDR's: leave --archive out")
    found = read_emoji(archives)
    if len(found) < 10:
        raise PrepareError(f"{archives[0].name} and the others share {len(found)} emoji: get the original packages")
    groups = grouped(found)
    splits = split_groups(groups, f"{NAME} {seed}")
    rows: dict[str, list[dict]] = {split: [] for split in ("train", "val", "test", "test_vendor")}
    alike = drawn_alike(found)
    for i, (emoji, group, split) in enumerate(zip(found, groups, splits, strict=True)):
        known = None if i in alike else "test_vendor"
        shown = {"train": ("train", known), "val": ("val", None), "test": (None, "test")}[split]
        for vendor, part in zip(VENDORS, shown, strict=True):
            if part:
                rows[part].append(record(emoji, vendor, found[group].name))
                path = target / image_path(emoji, vendor)
                path.parent.mkdir(parents=True, exist_ok=True)
                emoji.pictures[vendor].save(path)
    write_atomic(target / "README.txt", README)
    write_splits(target, rows)
    write_karpathy(target, NAME, {split: part for split, part in rows.items() if split != "test_vendor"})
    write_summary(target, rows)


def image_path(emoji: Emoji, vendor: str) -> str:
    return f"images/{vendor}/{emoji.code}.png"


def record(emoji: Emoji, vendor: str, group: str) -> dict:
    return {
        "id": f"{vendor}/{emoji.code}",
        "image": image_path(emoji, vendor),
        "text": emoji.name,
        "label": CATEGORIES[emoji.category],
        "object": group,
    }


def drawn_alike(found: Sequence[Emoji]) -> set[int]:
    """The emoji whose drawing by the held-out vendor is nearly one by the other."""
    prints = [np.stack([fingerprint(emoji.pictures[vendor]) for emoji in found]) for vendor in VENDORS]
    return {j for _, j in near_pairs(*prints)}


def grouped(found: Sequence[Emoji]) -> list[int]:
    """The group of each emoji: drawn nearly alike by whichever vendors, or named alike but for a person's sex and age."""
    pairs = drawn_nearly_alike(found)
    names = [PERSON.sub("", emoji.name.partition(":")[0]).strip() or "person" for emoji in found]
    return merged(len(found), pairs, [" ".join(name.split()) for name in names])


def drawn_nearly_alike(found: Sequence[Emoji]) -> list[tuple[int, int]]:
    """Pairs of emoji whose drawings, by whichever vendors, are near-duplicates."""
    prints = [np.stack([fingerprint(emoji.pictures[vendor]) for emoji in found]) for vendor in VENDORS]
    return [pair for a in prints for b in prints for pair in near_pairs(a, b)]


# the packages


def read_emoji(archives: Sequence[Path]) -> list[Emoji]:
    """`read_cut_outs`, on a plain ground."""
    return [replace(e, pictures={v: on_plain_ground(p) for v, p in e.pictures.items()}) for e in read_cut_outs(archives)]


def read_cut_outs(archives: Sequence[Path]) -> list[Emoji]:
    """Every emoji that is not left out, that both vendors draw and that CLDR names, in the order of their codes."""
    google, _, cldr = archives
    table = read_json(google, "emoji.json")
    names = read_json(cldr, "annotations/en/annotations.json")
    wanted: dict[str, tuple[str, str, str, tuple[str, ...]]] = {}
    try:
        spoken = names["annotations"]["annotations"]
        for entry in table:
            known = spoken_of(entry["unified"], spoken)
            name = next(iter(known.get("tts", ())), "")
            if name and entry["category"] in CATEGORIES:
                words = tuple(known.get("default", ()))
                wanted[entry["image"]] = (name, entry["category"], entry.get("subcategory", ""), words)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepareError(f"{google.name} or {cldr.name} has an unknown layout ({error!r}): get the originals") from None
    drawn = {v: read_pictures(path, f"img/{v}/64/", wanted) for v, path in zip(VENDORS, archives, strict=False)}
    both = sorted(drawn[VENDORS[0]].keys() & drawn[VENDORS[1]].keys())
    return [
        Emoji(file.removesuffix(".png"), *wanted[file], {vendor: drawn[vendor][file] for vendor in VENDORS}) for file in both
    ]


def spoken_of(unified: str, spoken: dict[str, Any]) -> dict[str, Any]:
    """CLDR's entry of the code points "1F3C3-200D-2640-FE0F"; the variation selector is no part of its keys."""
    text = "".join(chr(int(code, 16)) for code in unified.split("-"))
    return spoken.get(text) or spoken.get(text.replace("\ufe0f", "")) or {}


def read_json(archive: Path, path: str) -> Any:
    try:
        return json.loads(package_file(archive, path))
    except (ValueError, RecursionError) as error:
        raise PrepareError(f"{str(archive)!r} is not the whole package ({error}): download it again") from None


def read_pictures(archive: Path, folder: str, wanted: Collection[str]) -> dict[str, Image.Image]:
    """file name → cut-out, of those ``wanted`` in a folder of the package."""
    files = package_files(archive, lambda path: path.startswith(folder) and path.removeprefix(folder) in wanted)
    return {path.removeprefix(folder): cut_out(path, content) for path, content in files}
