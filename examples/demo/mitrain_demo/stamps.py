"""Tux Paint's stamps: cut-out photographs and drawings, each with a name and one of fourteen categories.

The Debian package holds ``usr/share/tuxpaint/stamps/CATEGORY/…/NAME.png`` beside ``NAME.txt``, whose first line is a
human's English caption ("An Indian blackbuck."). The caption gives the object's name and the folder its category;
the tables below correct the few captions that are exclamations or sentences, and the few folders that tell where a
drawing is used (Easter) rather than what it shows (a chick).
"""

import io
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mitrain.core.errors import PrepareError
from mitrain_demo.deb import members

ROOT = "tuxpaint/stamps/"  # below usr/share
COPYRIGHT = "doc/tuxpaint-stamps-default/copyright"
LONGEST = 512  # pixels of the longer side; larger stamps are scaled down
MAX_PIXELS = 16_000_000  # of a stamp
VISIBLE = 16  # alpha from which a pixel can be seen

# folder: (the category's name, what a yes/no question asks for)
CATEGORIES = {
    "animals": ("animals", "an animal"),
    "clothes": ("clothing", "something to wear"),
    "food": ("food", "something to eat"),
    "hobbies": ("hobbies", "something for a hobby"),
    "household": ("household", "a household item"),
    "medical": ("medicine", "something medical"),
    "military": ("military", "something military"),
    "people": ("people", "something to do with people"),
    "plants": ("plants", "a plant"),
    "seasonal": ("holidays", "something for a holiday"),
    "space": ("space", "something in space"),
    "sports": ("sports", "something used in sports"),
    "town": ("town", "something seen in a town"),
    "vehicles": ("vehicles", "a vehicle"),
}

# symbols and letters are no things; naturalforces has three pictures; the other two are a duplicate of
# people/fireman240a.png and two emblems without the car that they belong to
LEFT_OUT = ("symbols/", "naturalforces/", "military/fireman240a.png", "vehicles/emergency/sedan_police.png")

# what a picture shows, where its folder says only when or where it is used
SHOWS = {
    "animals": "bluebird bunny bunny-egg bunny-head chick chick-hatched chick-in-egg bat_left blackcat "
    "seasonal/easter/butterfly seasonal/halloween/spider",
    "plants": "seasonal/easter/daffodil",
    "food": "Christmas_pudding Mince_Pie Roast_turkey hard_candy",
    "town": "trainSign",
}

# names for captions that are sentences, jokes or too long
NAMED = {
    "penguin_with_spider": "penguin and spider",
    "pengwin": "penguin",
    "tux": "penguin",
    "bluegroper": "blue groper",
    "lionfish": "lionfish",
    "rabbit_little": "rabbit",
    "rabbit-2": "rabbit",
    "spider_computer": "spider",
    "spider_fly": "spider and fly",
    "spider_football": "spider",
    "teddy_bear": "teddy bear",
    "edward_bear": "teddy bear",
    "wings": "butterfly wings",
    "gnu-baby": "baby gnu",
    "gnu-baby-stand": "baby gnu",
    "sheep_lamb": "lamb",
    "wildboar": "wild boar",
    "avocado": "avocado",
    "cherimoya": "cherimoya",
    "lemon_slice": "sliced lemon",
    "garlic": "garlic",
    "ginger": "ginger root",
    "broccoli": "broccoli",
    "corn": "corn",
    "tomato": "tomato",
    "pasta_pot": "cooking pot",
    "toilet": "toilet",
    "measuring_tape": "measuring tape",
    "stethoscope": "stethoscope",
    "old_naval_shell": "artillery shell",
    "final-roll-call": "soldier's memorial",
    "bradley": "fighting vehicle",
    "infantry-stryker": "armored vehicle",
    "f22_raptor": "fighter jet",
    "ww2_german_gun": "tank",
    "grannysmith": "rag doll",
    "anemone_red": "anemone flower",
    "eggplant": "eggplant",
    "chemparathi": "hibiscus flower",
    "lavender": "lavender",
    "cep-2": "cep",
    "holly_leaves": "holly leaves",
    "birch": "birch tree",
    "rambutan": "rambutan",
    "German_Christmas_toy": "wooden toy",
    "chick-hatched": "chick",
    "chick-in-egg": "chick",
    "Santa": "santa claus",
    "menorah": "menorah",
    "apollo_lander": "lunar lander",
    "moon_crescent": "crescent moon",
    "spacewalk": "astronaut",
    "voyager2": "space probe",
    "australian_rules_football": "football",
    "football_helmet_front": "football helmet",
    "football_helmet_side": "football helmet",
    "docks": "docks",
    "fountain": "fountain",
    "hunter": "hunter's house",
    "ruins": "ruins",
    "cave_entrance": "cave entrance",
    "sword_in_the_stone": "sword in a stone",
    "arrow": "arrow sign",
    "crossroads": "crossroads sign",
    "dead_end_sign": "dead end sign",
    "give_way_sign": "give way sign",
    "hospital": "hospital sign",
    "no_entry_sign": "no entry sign",
    "no_uturn": "no u-turn sign",
    "railroad_crossing": "railroad crossing",
    "roundabout": "roundabout sign",
    "school_sign": "school sign",
    "stoplight_01_red": "traffic light",
    "stoplight_02_yellow": "traffic light",
    "stoplight_03_green": "traffic light",
    "t-junction": "t-junction sign",
    "toilets": "toilets sign",
    "xing_ped": "pedestrian crossing sign",
    "xing_school": "school crossing sign",
    "yield": "yield sign",
    "uk_post_box": "post box",
    "cementMixer": "cement truck",
    "towTruck": "tow truck",
    "tux_tractor": "tractor",
    "eddieCopter": "helicopter",
    "plane": "airplane",
    "tanker": "tank car",
    "tugboat": "tugboat",
    "bathyscape": "submarine",
    "chineseJunk": "sailing ship",
    "walnutBoat": "sailboat",
}
NAMED |= {f"grave-{letter}": "gravestone" for letter in "abcdefghij"}
NAMED |= {f"dreydl-{letter}": "dreidel" for letter in ("gimmel", "hay", "nun", "shin")}

ARTICLE = r"(an?|the|our|some|two|another)"
COLLECTION = r"(pair|bunch|cluster|head|string|quarter)s? of"
SIZE = r"(very )?(small|big|large|huge)"  # of the photograph's subject: says nothing beside a second copy
LEADING = re.compile(rf"^({ARTICLE} )?({COLLECTION} )?({SIZE} )?(?=\S)")
TRAILING = re.compile(r"[.,!?—(;:]| - | (?:that|which|resembles|covered|carries|is|are|in|with|from) ")

# words that leave an object's kind as it is: pictures that differ only in them never part across splits
QUALIFIERS = """
    red green yellow blue brown white black pink purple silver golden colorful happy little small big large huge
    very old-fashioned old modern new ripe sweet lit full crescent closed open sliced singing sitting sleeping
    poisonous baby male female floppy-eared eared floppy toy electric folded round square
"""


@dataclass(frozen=True)
class Stamp:
    """One cut-out. ``path`` is below the stamps' folder; ``kind`` is what pictures of the same object share; ``caption`` is
    the human's, as written."""

    path: str
    name: str
    kind: str
    category: str
    cartoon: bool
    image: Image.Image  # RGBA, cropped to what can be seen
    caption: str = ""


@dataclass(frozen=True)
class Collection:
    """Every usable stamp in the order of their paths, and the package's copyright file."""

    stamps: list[Stamp]
    copyright: str


def read_stamps(archive: Path) -> Collection:
    """The stamps of the Debian package ``archive``. Raises PrepareError."""
    wanted = members(archive, "usr/share", (".png", ".txt", COPYRIGHT))
    files = dict(tqdm(wanted, "unpacking stamps", unit=" files", disable=None))
    names, captions = {}, {}
    for path in sorted(path.removeprefix(ROOT) for path in files if path.startswith(ROOT) and path.endswith(".png")):
        caption = files.get(ROOT + path.removesuffix(".png") + ".txt")  # mirrored copies have none
        if caption and path.split("/")[0] in CATEGORIES and not path.startswith(LEFT_OUT):
            captions[path] = caption.decode("utf-8", "replace").partition("\n")[0].strip()
            names[path] = name_of(path, captions[path])
    if not names:
        raise PrepareError(f"{str(archive)!r} holds no captioned stamps: give the package tuxpaint-stamps-default")
    kinds = kinds_of(names.values())
    stamps = [
        Stamp(path, name, kinds[name], category_of(path), "/cartoon/" in path, cut_out(path, files[ROOT + path]), text)
        for (path, name), text in zip(names.items(), captions.values(), strict=True)
    ]
    return Collection(stamps, files.get(COPYRIGHT, b"").decode("utf-8", "replace"))


def name_of(path: str, caption: str) -> str:
    """The object's name: "A pair of cherries." → "cherries"."""
    known = NAMED.get(Path(path).stem)
    if known:
        return known
    text = re.sub('[“”"]', "", caption.lower()).replace("’", "'")
    text = TRAILING.split(text.strip(" –"))[0].strip(" –'")
    return LEADING.sub("", text) or Path(path).stem


def category_of(path: str) -> str:
    """The folder that tells what the picture shows."""
    for folder, stems in SHOWS.items():
        if {Path(path).stem, path.removesuffix(".png")} & set(stems.split()):
            return folder
    return path.split("/")[0]


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """name → kind: "red apple" and "apples" are both "apple"; "little penguin" is a "penguin", which is a name too."""
    plain = {name: unqualified(name) for name in names}
    known = set(plain.values())
    return {name: shortest_known_tail(kind, known) for name, kind in plain.items()}


def unqualified(name: str) -> str:
    words = name.split()
    while len(words) > 1 and words[0] in QUALIFIERS.split():
        words = words[1:]
    return " ".join([*words[:-1], singular(words[-1])])


def singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def shortest_known_tail(kind: str, known: set[str]) -> str:
    words = kind.split()
    tails = [" ".join(words[start:]) for start in range(len(words))]
    return next(tail for tail in reversed(tails) if tail in known)


def cut_out(path: str, content: bytes) -> Image.Image:
    """The picture as RGBA, cropped to what can be seen, at most LONGEST pixels long."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the next line is stricter
            image = Image.open(io.BytesIO(content), formats=["PNG", "WEBP"])
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        image = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PrepareError(f"the stamp {path} is no readable PNG ({error}): get the original package") from None
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= VISIBLE)).getbbox()
    image = image.crop(box or (0, 0, *image.size))
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image
