"""Scenes of a few cut-outs with exact masks, and expressions that refer to one of them.

A name alone refers to an object that is there once. Where a scene shows the same cut-out twice, the expression needs
a place or a size ("the raspberry on the left", "the bigger penguin"), and the two copies are laid out so that it
holds without doubt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np
from PIL import Image, ImageOps

from mitrain_demo.backgrounds import background

OPAQUE = 128  # alpha from which a pixel belongs to the object
CONTRAST = 24  # mean difference (of 255) of an object from the background that it hides, at least
TRIES = 40  # places tried for an object before it may cover others, and before the scene is begun anew
FULL = 0.45  # of its square that a compact object covers; slimmer ones are drawn larger, up to STRETCH times
STRETCH = 1.15

# relation: the expressions for (first, second), where first is further left, further up or bigger
TEMPLATES = {
    "horizontal": ("the {} on the left", "the {} on the right"),
    "vertical": ("the top {}", "the bottom {}"),
    "size": ("the bigger {}", "the smaller {}"),
}
NAME_ONLY = "the {}"
# how often a scene has how many objects, and whether one of them is there twice
LAYOUTS = {(3, False): 0.15, (4, False): 0.1, (3, True): 0.2, (4, True): 0.55}


@dataclass(frozen=True)
class Thing:
    """A cut-out with its name. Things that share an element of ``family`` are never in one scene. ``category``: what it is
    an instance of, as animal, if anything; ``words``: what else it has to do with."""

    name: str
    family: frozenset[str]
    image: Image.Image  # RGBA
    category: str = ""
    words: tuple[str, ...] = ()

    @cached_property
    def stretch(self) -> float:
        """How many times longer than a compact thing it is drawn."""
        filled = solid(self.image).sum() / max(self.image.size) ** 2
        return min(STRETCH, max(1.0, (FULL / filled) ** 0.5))


@dataclass(frozen=True)
class Style:
    """Measures of a scene in pixels."""

    size: int = 224
    sides: tuple[int, int] = (90, 108)  # an object's longer side
    big: int = 118  # the longer side of the bigger and of the smaller copy
    small: int = 85
    gap: int = 60  # between the centres of two copies that a place tells apart
    visible: float = 0.75  # of an object that others leave uncovered, at least
    clear: float = 0.97  # the same, where there is room
    mirror: bool = True  # half of the objects


@dataclass
class Shown:
    """An object in a scene. ``mask`` (size, size) bool: its visible pixels."""

    thing: Thing
    image: Image.Image
    solid: np.ndarray  # (image's height, width) bool
    twin: str = ""  # the relation to its copy, if it has one
    corner: tuple[int, int] = (0, 0)  # x, y of the upper left one
    mask: np.ndarray | None = None
    expression: str = ""

    @property
    def kind(self) -> str:
        """What the expression needs: "name", or the relation to the copy."""
        return self.twin or "name"

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the scene."""
        (left, top), (height, width) = self.corner, self.solid.shape
        return slice(top, top + height), slice(left, left + width)

    @property
    def centre(self) -> tuple[float, float]:
        return self.corner[0] + self.image.width / 2, self.corner[1] + self.image.height / 2


def solid(image: Image.Image) -> np.ndarray:
    """(h, w) bool: the pixels that belong to the object."""
    return np.asarray(image.getchannel("A")) >= OPAQUE


def scene(things: Sequence[Thing], style: Style, random: Random) -> tuple[Image.Image, list[Shown]]:
    """A picture and what is in it, each object with the expression that refers to it."""
    shown: list[Shown] = []
    while not shown or not lay_out(shown, style, random):
        shown = choose(things, style, random)
    while True:
        ground = background(style.size, random)
        picture = paint(shown, ground)
        change = np.abs(picture.astype(np.int16) - ground).mean(2)
        if all(change[one.mask].mean() >= CONTRAST for one in shown):
            break
        if random.random() < 0.05:  # a thing that no background suits
            return scene(things, style, random)
    name_each(shown)
    return Image.fromarray(picture), shown


def choose(things: Sequence[Thing], style: Style, random: Random) -> list[Shown]:
    """Three or four objects, in the order in which they are painted; the first two may be copies."""
    (count, twice) = random.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    picked: list[Thing] = []
    for thing in random.sample(things, len(things)):
        if len(picked) < count - twice and not any(thing.family & other.family for other in picked):
            picked.append(thing)
    shown = [show(thing, random.randint(*style.sides) * thing.stretch, style, random) for thing in picked]
    if twice:
        shown[:1] = copies(picked[0], style, random)
    random.shuffle(shown)
    return shown


def copies(thing: Thing, style: Style, random: Random) -> list[Shown]:
    relation = random.choice(list(TEMPLATES))
    side = random.randint(*style.sides) * thing.stretch
    sides = (style.big, style.small) if relation == "size" else (side, side)
    return [show(thing, side, style, random, relation) for side in sides]


def show(thing: Thing, side: float, style: Style, random: Random, twin: str = "") -> Shown:
    """The thing with a longer side of ``side`` pixels, mirrored half of the time where that may be."""
    scale = side / max(thing.image.size)
    image = thing.image.resize([max(1, round(scale * length)) for length in thing.image.size], Image.Resampling.LANCZOS)
    if random.random() < 0.5 and style.mirror:
        image = ImageOps.mirror(image)
    return Shown(thing, image, solid(image), twin)


def lay_out(shown: Sequence[Shown], style: Style, random: Random) -> bool:
    """Give every object a place and its visible mask, or return False where they find no room."""
    for count, one in enumerate(shown):
        needs = [style.clear] * TRIES + [style.visible] * TRIES
        if not any(try_place(one, shown[:count], style, need, random) for need in needs):
            return False
    return True


def try_place(one: Shown, earlier: Sequence[Shown], style: Style, need: float, random: Random) -> bool:
    """Put ``one`` somewhere over the ``earlier`` ones, if the share ``need`` of each and its relation remain."""
    width, height = one.image.size
    one.corner = (random.randint(1, style.size - width - 1), random.randint(1, style.size - height - 1))
    for other in earlier:
        left = np.count_nonzero(other.mask) - np.count_nonzero(other.mask[one.box] & one.solid)
        if left < need * np.count_nonzero(other.solid) or not apart(one, other, style.gap):
            return False
    for other in earlier:
        other.mask[one.box] &= ~one.solid
    one.mask = np.zeros((style.size, style.size), bool)
    one.mask[one.box] = one.solid
    return True


def apart(one: Shown, other: Shown, gap: float) -> bool:
    """Whether two copies stand so that their relation holds without doubt; other pairs may stand as they like."""
    axis = {"horizontal": 0, "vertical": 1}.get(one.twin)
    return axis is None or other.twin != one.twin or abs(one.centre[axis] - other.centre[axis]) >= gap


def paint(shown: Sequence[Shown], ground: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(ground)
    for one in shown:
        picture.paste(one.image, one.corner, one.image)
    return np.asarray(picture)


def name_each(shown: Sequence[Shown]) -> None:
    for one in shown:
        one.expression = NAME_ONLY.format(one.thing.name)
    twins = [one for one in shown if one.twin]
    if twins:
        relation = twins[0].twin
        order = {"horizontal": lambda one: one.centre[0], "vertical": lambda one: one.centre[1]}
        twins.sort(key=order.get(relation, lambda one: -max(one.image.size)))
        for one, template in zip(twins, TEMPLATES[relation], strict=True):
            one.expression = template.format(one.thing.name)
