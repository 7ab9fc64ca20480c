"""Writes referring data in RefCOCO's own layout: ``refs(unc).p``, ``instances.json`` and a folder of pictures.

The layout is the one of github.com/lichengunc/refer: a pickled list of references, each with its sentences, and the
COCO annotations with one mask per object.
"""

import io
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from mitrain.core.files import write_atomic
from mitrain_demo.compose import Shown

DATASET, SPLIT_BY = "refcoco", "unc"
IMAGES = "images/mscoco/images/train2014"
QUALITY = 95  # of the JPEG pictures


class RefCocoWriter:
    """Collects scenes and writes them below ``root``."""

    def __init__(self, root: Path):
        self.root = root
        self.refs: list[dict] = []
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.categories: dict[str, int] = {}
        (root / IMAGES).mkdir(parents=True)

    def add(self, split: str, picture: Image.Image, shown: list[Shown]) -> None:
        """A scene, and of each object its one expression."""
        for one, number in zip(shown, self.add_scene(split, picture, shown), strict=True):
            self.refer(self.refs, split, [number], one.expression, one.kind)

    def add_scene(self, split: str, picture: Image.Image, shown: list[Shown]) -> list[int]:
        """A scene; returns the numbers of its objects' annotations."""
        image_id = len(self.images) + 1
        name = f"{split}_{image_id:06d}.jpg"
        self.save(name, picture)
        self.images.append({"id": image_id, "file_name": name, "height": picture.height, "width": picture.width})
        return [self.add_object(image_id, one) for one in shown]

    def save(self, name: str, picture: Image.Image) -> None:
        picture.save(self.root / IMAGES / name, quality=QUALITY, subsampling=0)

    def add_object(self, image_id: int, one: Shown) -> int:
        number = len(self.annotations) + 1
        category = self.categories.setdefault(one.thing.name, len(self.categories) + 1)
        self.annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": category,
                "bbox": bounding_box(one.mask),
                "area": int(one.mask.sum()),
                "iscrowd": 0,
                "segmentation": run_lengths(one.mask),
            }
        )
        return number

    def refer(self, refs: list[dict], split: str, targets: list[int], text: str, kind: str, reference: str = "") -> None:
        """Append to ``refs`` that ``text`` means the annotations ``targets``; ``reference``: a second picture's file."""
        number, annotation = len(refs) + 1, self.annotations[targets[0] - 1]  # each with one sentence
        file_name = self.images[annotation["image_id"] - 1]["file_name"]
        sentence = {"sent_id": number, "sent": text, "raw": text, "tokens": text.split()}
        refs.append(
            {
                "ref_id": number,
                "ann_id": targets if len(targets) > 1 else targets[0],
                "category_id": annotation["category_id"],
                "image_id": annotation["image_id"],
                "file_name": file_name.replace(".jpg", f"_{number}.jpg"),
                "split": split,
                "kind": kind,  # this and the next are ours: no reader of RefCOCO minds more keys
                **({"reference": reference} if reference else {}),
                "sent_ids": [number],
                "sentences": [sentence],
            }
        )

    def finish(self, **refs: list[dict]) -> None:
        """Write the annotations, and ``refs`` by what they are split by (left out: those of `add`)."""
        folder = self.root / DATASET
        categories = [{"id": number, "name": name} for name, number in self.categories.items()]
        instances = {"images": self.images, "annotations": self.annotations, "categories": categories}
        write_atomic(folder / "instances.json", json.dumps(instances, separators=(",", ":")))
        for name, rows in (refs or {SPLIT_BY: self.refs}).items():
            pickled = io.BytesIO()
            pickle.Pickler(pickled, protocol=2).dump(rows)
            write_atomic(folder / f"refs({name}).p", pickled.getvalue())


def bounding_box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of the true pixels of ``mask`` (h, w)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of ``mask`` (h, w): down the columns, beginning with a run of zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}
