"""The data set ``object-scenes``: composed scenes of stamps and of two vendors' emoji, with expressions of many kinds.

Everything drawn under one name is held out together, whoever drew it. Splits: ``train``; ``val``, the same things in new
scenes; ``testA``, stamps of things never seen in training; ``testB``, emoji of such. The same scenes have three sets of
expressions, by ``split_by``: ``text`` (ten kinds of descriptions), ``reference`` (about a second picture, the input
``reference``: the same thing by another artist where there is one), ``reasoning`` (about it, too, where it must be thought
about: another of its kind, all but it).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic, write_json
from mitrain.data.duplicates import merged
from mitrain_demo.backgrounds import background
from mitrain_demo.compose import CONTRAST, Shown, Style, Thing, scene, solid
from mitrain_demo.emoji import VENDORS, Emoji, drawn_nearly_alike, read_cut_outs
from mitrain_demo.phrases import Balance, Phrase, about_references, texts_alone
from mitrain_demo.refcoco_files import RefCocoWriter
from mitrain_demo.scenes import ENOUGH, FEWEST, is_target
from mitrain_demo.splits import split_groups
from mitrain_demo.stamps import Stamp, kinds_of, read_stamps
from mitrain_demo.tuxpaint import on_plain_ground

NAME = "object-scenes"
SCENES = {"train": 3600, "val": 250, "testA": 220, "testB": 250}
SHARES = {"train": 0.75, "test": 0.25}
EACH = {"text": 4, "reference": 2, "reasoning": 2}  # expressions of a scene
WEIGHTS = {"name": 4.0, "place": 2.0, "size": 2.0, "category": 2.0, "same": 2.0, "odd": 0.5}
SAMES = ("same", "same, place", "same, size")
REFERENCE = (130, 190)  # pixels of a reference's longer side, in a picture of a scene's size
POOLS = (
    0.4,
    0.75,
)  # up to these chances a scene is of any things, of two of a category and others, else of three and one

STAMP_CATEGORIES = {
    **{"animals": "animal", "food": "food", "plants": "plant", "vehicles": "vehicle", "clothes": "piece of clothing"},
    **{"sports": "sports item", "household": "household item", "medical": "medical item"},
}
EMOJI_CATEGORIES = {
    **{"animal": "animal", "food": "food", "plant": "plant", "transport": "vehicle", "clothing": "piece of clothing"},
    **{"sport": "sports item", "household": "household item", "dishware": "household item", "medical": "medical item"},
    **{"tool": "tool", "musical": "musical instrument", "place-building": "building"},
}
LEFT_OUT = ("People & Body", "Smileys & Emotion")

README = """Composed scenes of Tux Paint stamps, Noto emoji and Twemoji, made by mitrain from the Debian package
tuxpaint-stamps-default and the npm packages emoji-datasource-google, emoji-datasource-twitter, cldr-annotations-full.

Stamps: the Tux Paint contributors, GPL-2 as a whole (see COPYRIGHT). Noto Emoji: Google, Apache-2.0. Twemoji: Twitter and
contributors, CC-BY-4.0. Names and keywords of emoji: Unicode CLDR, Unicode-3.0. Cut out, scaled, mirrored and put together
on drawn backgrounds at random from a seed.

refcoco/refs(text).p, refs(reference).p, refs(reasoning).p, instances.json, images/mscoco/images/train2014: RefCOCO's layout.
summary.json: counts.
"""


@dataclass(frozen=True)
class Drawing:
    """A thing as one artist drew it. ``group``: shared by what must not part across splits."""

    thing: Thing
    source: str
    group: int


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the stamps' package, two vendors' emoji and CLDR's. Raises PrepareError."""
    if len(archives) != 4:
        raise PrepareError(f"{NAME} is made from four packages, stamps, two vendors' emoji and CLDR: leave --archive out")
    collection = read_stamps(archives[0])
    drawings = drawings_of(collection.stamps, read_cut_outs(archives[1:]))
    write_atomic(target / "README.txt", README)
    write_atomic(target / "COPYRIGHT", collection.copyright)
    write_objects(target, share_drawings(drawings, seed), SCENES, Style(), seed)


def drawings_of(stamps: Sequence[Stamp], emoji: Sequence[Emoji]) -> list[Drawing]:
    """Every drawing that can be segmented; those of a kind, and near-duplicates, are one group."""
    emoji = [one for one in emoji if one.category not in LEFT_OUT and one.group != "time"]
    names = [stamp.name for stamp in stamps] + [one.name.removesuffix(" face").lower() for one in emoji]
    kinds = kinds_of(names)
    plain = [replace(e, pictures={v: on_plain_ground(p) for v, p in e.pictures.items()}) for e in emoji]
    pairs = [(len(stamps) + i, len(stamps) + j) for i, j in drawn_nearly_alike(plain)]
    groups = merged(len(names), pairs, [kinds[name] for name in names])
    drawings = []
    for i, stamp in enumerate(stamps):
        image = stamp.image.copy()
        image.thumbnail((ENOUGH, ENOUGH), Image.Resampling.LANCZOS)
        category = STAMP_CATEGORIES.get(stamp.category, "")
        if is_target(stamp):
            thing = Thing(names[i], frozenset({kinds[names[i]]}), image, category)
            drawings.append(Drawing(thing, "stamp", groups[i]))
    for i, one in enumerate(emoji, len(stamps)):
        category = next((name for start, name in EMOJI_CATEGORIES.items() if one.group.startswith(start)), "")
        words = tuple(word for word in one.words if word.isalpha() and word.isascii() and len(word) > 2)
        for vendor in VENDORS:
            thing = Thing(names[i], frozenset({kinds[names[i]]}), one.pictures[vendor], category, words)
            if is_target(thing):
                drawings.append(Drawing(thing, vendor, groups[i]))
    return drawings


def share_drawings(drawings: Sequence[Drawing], seed: int) -> dict[str, list[Thing]]:
    """split → its things; of those held out stamps and emoji are apart."""
    splits = split_groups([drawing.group for drawing in drawings], f"{NAME} {seed}", SHARES)
    things = defaultdict(list)
    for drawing, split in zip(drawings, splits, strict=True):
        name = "train" if split == "train" else "testA" if drawing.source == "stamp" else "testB"
        things[name].append(drawing.thing)
    return things | {"val": things["train"]}


def write_objects(target: Path, things: dict[str, list[Thing]], scenes: dict[str, int], style: Style, seed: int) -> None:
    """Compose ``scenes[split]`` scenes of ``things[split]`` for each split, with all sets of expressions, and a summary."""
    writer, refs = RefCocoWriter(target), {name: [] for name in EACH}
    pictures = References(writer, [thing for part in ("train", "testA", "testB") for thing in things.get(part, ())])
    for split, count in scenes.items():
        if len({thing.name for thing in things.get(split, ())}) < 4:
            raise PrepareError(f"too few usable things for the split {split} of {NAME}: give the whole packages")
        random, balances = Random(f"{NAME} {seed} {split}"), {name: Balance(WEIGHTS) for name in EACH}
        for _ in tqdm(range(count), f"{NAME} {split}", unit=" scenes", disable=None):
            shown: list[Shown] = []
            while len(shown) < FEWEST:  # a pool may hold too few that can meet
                picture, shown = scene(pool(things[split], random), style, random)
            numbers = writer.add_scene(split, picture, shown)
            phrases = {"text": list(texts_alone(shown))}
            about = list(about_references(shown, absent(things[split], shown, random)))
            phrases["reference"] = [phrase for phrase in about if phrase.kind in SAMES]
            phrases["reasoning"] = [phrase for phrase in about if phrase.kind not in SAMES]
            for name, found in phrases.items():
                random.shuffle(found)
                for phrase in balances[name].pick(found, EACH[name]):
                    shows = pictures.of(phrase, shown, random)
                    writer.refer(refs[name], split, [numbers[i] for i in phrase.targets], phrase.text, phrase.kind, shows)
    writer.finish(**refs)
    write_json(target / "summary.json", {split: summarise(refs, split, things[split]) for split in scenes})


def summarise(refs: dict[str, list[dict]], split: str, things: Sequence[Thing]) -> dict:
    own = {name: [ref for ref in rows if ref["split"] == split] for name, rows in refs.items()}
    return {
        "scenes": len({ref["image_id"] for ref in own["text"]}),
        "names": len({thing.name for thing in things}),
        "drawings": len(things),
        "kinds": {name: dict(Counter(ref["kind"] for ref in rows)) for name, rows in own.items()},
    }


def pool(things: Sequence[Thing], random: Random) -> list[Thing]:
    """What a scene is chosen from: any things, or a few so that two or three are of one category."""
    chance = random.random()
    some = random.sample(things, 8)
    categories = {one.category for one in some} - {""}
    if chance < POOLS[0] or not categories:
        return some
    category = random.choice(sorted(categories))
    few = {thing.name: thing for thing in random.sample(things, len(things)) if thing.category == category}
    others = [thing for thing in some if thing.category != category]
    count = 2 if chance < POOLS[1] else 3
    return list(few.values())[:count] + others[: 4 - count]


def absent(things: Sequence[Thing], shown: Sequence[Shown], random: Random) -> dict[str, list[Thing]]:
    """For each category one thing of it that is not in the scene, nor of the family of one that is."""
    there = frozenset().union(*(one.thing.family for one in shown))
    found: dict[str, list[Thing]] = {}
    for thing in random.sample(things, min(len(things), 200)):
        if not thing.family & there:
            found.setdefault(thing.category, [thing])
    return found


class References:
    """Pictures of things alone, one of each drawing, written when first asked for."""

    def __init__(self, writer: RefCocoWriter, things: Sequence[Thing]):
        self.writer, self.written = writer, {}
        self.drawn = defaultdict(list)
        for thing in things:
            self.drawn[thing.name].append(thing)

    def of(self, phrase: Phrase, shown: Sequence[Shown], random: Random) -> str:
        """The file of another drawing of what the phrase refers to, where there is one, else of the same; "" for none."""
        if phrase.reference is None:
            return ""
        others = [thing for thing in self.drawn[phrase.reference.name] if thing is not phrase.reference]
        thing = random.choice(others) if others else phrase.reference
        if id(thing) not in self.written:
            self.written[id(thing)] = f"reference_{len(self.written) + 1:06d}.jpg"
            self.writer.save(self.written[id(thing)], alone(thing, random))
        return self.written[id(thing)]


def alone(thing: Thing, random: Random) -> Image.Image:
    """The thing by itself, mirrored half of the time, on a drawn background that it stands out from."""
    side = random.randint(*REFERENCE)
    scale = side / max(thing.image.size)
    size = [max(1, round(scale * length)) for length in thing.image.size]
    image = thing.image.resize(size, Image.Resampling.LANCZOS)
    image = ImageOps.mirror(image) if random.random() < 0.5 else image
    while True:
        ground = background(Style.size, random)
        picture = Image.fromarray(ground)
        corner = tuple(random.randint(8, Style.size - length - 8) for length in image.size)
        picture.paste(image, corner, image)
        change = np.abs(np.asarray(picture).astype(np.int16) - ground).mean(2)
        inside = change[corner[1] : corner[1] + image.height, corner[0] : corner[0] + image.width]
        if inside[solid(image)].mean() >= CONTRAST or random.random() < 0.05:
            return picture
