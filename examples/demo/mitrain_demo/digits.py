"""The data sets ``digits`` and ``digit-scenes``: scikit-learn's bundled handwritten digits in both forms.

Nothing to download, seconds to make, and every kind of file that the real data sets have: what tests and a first try
run on. No drawing is in two splits.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mitrain.core.files import write_atomic
from mitrain_demo.compose import Style, Thing
from mitrain_demo.scenes import write_scenes

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAWINGS = {"train": 800, "val": 100, "test": 200}
SIDE = 56  # pixels of a picture; the drawings have 8
DIGIT_PROMPT = "The digit in this picture is"
YESNO_PROMPT = "Question: Is the digit in this picture {}? Answer:"

SCENES = {"train": 200, "val": 40, "testA": 40, "testB": 40}
EACH = {"train": 20, "val": 8, "testA": 8, "testB": 8}  # drawings of each digit
SMALL_SCENES = Style(size=112, sides=(30, 40), big=48, small=30, gap=32, mirror=False)

README = """Handwritten digits, made by mitrain from scikit-learn's copy of the test set of "Optical Recognition of
Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0): enlarged from 8 x 8 pixels,
the questions and scenes drawn from a seed.
"""


def build_answers(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` with pictures and questions; ``archives`` is empty."""
    write_atomic(target / "README.txt", README)
    (target / "images").mkdir()
    order = shuffled(seed)
    for split, count in DRAWINGS.items():
        rows = []
        for _ in range(count):
            number, digit, drawing = next(order)
            name = f"images/{number:04d}.png"
            ink_on_paper = intensity(drawing, SIDE).point(lambda value: 255 - value).convert("RGB")
            ink_on_paper.save(target / name)
            rows += questions(f"{number:04d}", name, digit)
        write_atomic(target / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def build_scenes(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` with scenes in RefCOCO's layout; ``archives`` is empty.

    testA and testB are alike: drawings that are in no other split.
    """
    write_atomic(target / "README.txt", README)
    order, things = shuffled(seed), {}
    for split, each in EACH.items():
        left = dict.fromkeys(WORDS, each)
        things[split] = []
        while any(left.values()):
            number, digit, drawing = next(order)
            if left[WORDS[digit]]:
                left[WORDS[digit]] -= 1
                things[split].append(Thing(WORDS[digit], frozenset({WORDS[digit]}), coloured(drawing, number)))
    write_scenes(target, "digit-scenes", things, SCENES, SMALL_SCENES, seed)


def shuffled(seed: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(number, digit, drawing (8, 8) of 0..16) in an order drawn from the seed."""
    bundled = load_digits()
    order = list(range(len(bundled.target)))
    Random(f"digits {seed}").shuffle(order)
    for number in order:
        yield number, int(bundled.target[number]), bundled.images[number]


def questions(number: str, image: str, digit: int) -> list[dict]:
    """What digit it is, and whether it is even; of every second drawing whether it is odd, to balance yes and no."""
    asked = ("even", "odd")[int(number) % 2]
    right = digit % 2 == ("even", "odd").index(asked)
    shared = {"image": image, "object": f"drawing {number}"}
    return [
        {"id": number, "prompt": DIGIT_PROMPT, "answer": WORDS[digit], "candidates": WORDS, "kind": "digit", **shared},
        {
            "id": f"{number}-parity",
            "prompt": YESNO_PROMPT.format(asked),
            "answer": "yes" if right else "no",
            "candidates": ("yes", "no"),
            "kind": "yesno",
            **shared,
        },
    ]


def intensity(drawing: np.ndarray, side: int) -> Image.Image:
    """Grey picture of ``side`` pixels, bright where there is ink."""
    grey = Image.fromarray((drawing * 255 / 16).round().astype(np.uint8))
    return grey.resize((side, side), Image.Resampling.BICUBIC)


def coloured(drawing: np.ndarray, number: int) -> Image.Image:
    """RGBA cut-out, cropped to the ink, in one of many dark or light colours."""
    alpha = intensity(drawing, SIDE).point(lambda value: min(255, 2 * value))
    picture = Image.new("RGB", alpha.size, tuple(Random(number).choices((20, 60, 200, 240), k=3)))
    picture.putalpha(alpha)
    return picture.crop(alpha.getbbox())
