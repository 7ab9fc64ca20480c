"""Drawn backgrounds for composed scenes: plain colours, gradients, clouds of noise and faint patterns.

Drawn ones never repeat, so a background cannot give away a scene or its split.
"""

import colorsys
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image


def background(size: int, random: Random) -> np.ndarray:
    """(size, size, 3) uint8."""
    draw: Callable = random.choice((plain, gradient, clouds, pattern))
    first = colour(random)
    blend = draw(size, random)[..., None]
    return (first + blend * (near(first, random, draw is pattern) - first)).clip(0, 255).astype(np.uint8)


def colour(random: Random) -> np.ndarray:
    """(3,) of any hue, neither black nor white nor garish."""
    return 255 * np.array(colorsys.hsv_to_rgb(random.random(), random.uniform(0.05, 0.55), random.uniform(0.4, 0.97)))


def near(first: np.ndarray, random: Random, close: bool) -> np.ndarray:
    """A second colour; for patterns one close to the first, so that the pattern stays behind the objects."""
    return first + random.choice((-1, 1)) * random.uniform(12, 30) if close else colour(random)


def coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))


def plain(size: int, random: Random) -> np.ndarray:
    return np.zeros((size, size))


def gradient(size: int, random: Random) -> np.ndarray:
    """From one colour to another, along a direction or outwards from a point."""
    x, y = coordinates(size)
    if random.random() < 0.5:
        angle = random.uniform(0, 2 * np.pi)
        values = np.cos(angle) * x + np.sin(angle) * y
    else:
        values = np.hypot(x - random.random(), y - random.random())
    return (values - values.min()) / np.ptp(values)


def clouds(size: int, random: Random) -> np.ndarray:
    """Noise of three scales, smoothed."""
    noise = np.random.default_rng(random.getrandbits(32))
    total = np.zeros((size, size))
    for cells, weight in ((random.randint(2, 5), 0.6), (random.randint(8, 16), 0.3), (random.randint(40, 80), 0.1)):
        small = Image.fromarray((255 * noise.random((cells, cells))).astype(np.uint8))
        total += weight * np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)) / 255
    return total


def pattern(size: int, random: Random) -> np.ndarray:
    """Stripes, checks or dots."""
    x, y = coordinates(size)
    cells = random.randint(5, 18)
    angle = random.uniform(0, np.pi)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    waves = (np.sin(cells * np.pi * along), np.sin(cells * np.pi * across))
    match random.choice(("stripes", "checks", "dots")):
        case "stripes":
            return (waves[0] > 0).astype(float)
        case "checks":
            return (waves[0] * waves[1] > 0).astype(float)
        case _:
            return (np.abs(waves[0] * waves[1]) > 0.6).astype(float)
