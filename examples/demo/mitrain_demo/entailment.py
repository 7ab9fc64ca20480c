"""The data set ``tuxpaint-entailment``: SNLI-VE's own format, with pairs *derived* from captions by rules.

The labels follow from human metadata, not from annotators. Entailed: the picture's name, or its category; contradicted:
those of another picture; neutral: the right name with a circumstance that no picture shows. Contradictions come with and
without such a circumstance and ask what the others ask, so that a text alone tells at most what is not entailed (two
thirds of the labels); the picture decides the rest.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from mitrain.core.files import write_atomic, write_json
from mitrain_demo.captions import grouped
from mitrain_demo.stamps import Stamp, read_stamps
from mitrain_demo.tuxpaint import (
    category_phrase,
    derangement,
    name_phrase,
    on_plain_ground,
    split_kinds,
    write_texts,
)

FILES = {"train": "train", "val": "dev", "test": "test"}
PLAIN = "The picture shows {}."
CIRCUMSTANCES = (
    "The picture shows {} that was a birthday present.",
    "The picture shows {} from a small village.",
    "The picture shows {} that a teacher talked about.",
    "The picture shows {} that won a prize last year.",
    "The picture shows {} that many children like.",
    "The picture shows {} that was seen on a Monday.",
)

README = """Tux Paint stamps with sentences that they entail, contradict or leave open, made by mitrain from the Debian
package tuxpaint-stamps-default.

DERIVED: the sentences and labels follow from captions and categories by rules; no annotator has seen them. Pictures and
captions: the Tux Paint contributors, GPL-2 as a whole (see COPYRIGHT). Cropped, scaled down and put on a plain ground.

snli_ve_{train,dev,test}.jsonl, flickr30k_images/: SNLI-VE's own layout, nothing of its data. summary.json: counts.
"""


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian package ``archives[0]``. Raises PrepareError."""
    collection = read_stamps(archives[0])
    write_texts(collection, target, README)
    pictures = [on_plain_ground(stamp.image) for stamp in collection.stamps]
    stamps = grouped(collection.stamps, pictures)
    (target / "flickr30k_images").mkdir()
    for stamp, picture in zip(stamps, pictures, strict=True):
        picture.save(target / "flickr30k_images" / file_name(stamp))
    splits = split_kinds(stamps, seed)
    summary = {}
    for split, name in FILES.items():
        rows = pairs([s for s in stamps if splits[s.kind] == split], Random(f"entailment {seed} {split}"))
        write_atomic(target / f"snli_ve_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        labels = Counter(row["gold_label"] for row in rows)
        summary[split] = {"pairs": len(rows), "images": len({r["Flickr30kID"] for r in rows}), "labels": dict(labels)}
    write_json(target / "summary.json", summary)


def file_name(stamp: Stamp) -> str:
    """One name without folders, as SNLI-VE has."""
    return stamp.path.replace("/", "_")


def pairs(stamps: Sequence[Stamp], random: Random) -> list[dict]:
    """Six pairs a picture: by name and by category, each entailed, neutral and contradicted."""
    order = list(stamps)
    random.shuffle(order)
    rows: dict[str, list[dict]] = {stamp.path: [] for stamp in stamps}
    for phrase, key in ((name_phrase, lambda stamp: stamp.kind), (category_phrase, lambda stamp: stamp.category)):
        for position, (stamp, other) in enumerate(zip(order, derangement(order, key, random), strict=True)):
            rows[stamp.path] += three(stamp, other, phrase, position, random, len(rows[stamp.path]))
    return [row for stamp in stamps for row in rows[stamp.path]]


def three(
    stamp: Stamp, other: Stamp, phrase: Callable[[Stamp], str], position: int, random: Random, first: int
) -> list[dict]:
    """An entailed, a neutral and (where the other phrase is another) a contradicted sentence, every second of the latter
    with a circumstance."""
    right, wrong = phrase(stamp), phrase(other)
    said = [("entailment", PLAIN.format(right)), ("neutral", random.choice(CIRCUMSTANCES).format(right))]
    if wrong != right and other.kind != stamp.kind:
        template = random.choice(CIRCUMSTANCES) if position % 2 else PLAIN
        said.append(("contradiction", template.format(wrong)))
    return [pair(stamp, label, text, first + i) for i, (label, text) in enumerate(said)]


def pair(stamp: Stamp, label: str, text: str, number: int) -> dict:
    name = file_name(stamp)
    return {
        "annotator_labels": [label],
        "captionID": f"{name}#0",
        "gold_label": label,
        "pairID": f"{name}#0r{number}{label[0]}",
        "sentence1": stamp.caption,
        "sentence2": text,
        "Flickr30kID": name,
    }
