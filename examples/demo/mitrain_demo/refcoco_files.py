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
        image_id = len(self.images) + 1
        name = f"{split}_{image_id:06d}.jpg"
        picture.save(self.root / IMAGES / name, quality=QUALITY, subsampling=0)
        self.images.append({"id": image_id, "file_name": name, "height": picture.height, "width": picture.width})
        for one in shown:
            self.add_object(split, image_id, name, one)

    def add_object(self, split: str, image_id: int, file_name: str, one: Shown) -> None:
        number = len(self.annotations) + 1  # one reference and one sentence for each object
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
        sentence = {"sent_id": number, "sent": one.expression, "raw": one.expression, "tokens": one.expression.split()}
        self.refs.append(
            {
                "ref_id": number,
                "ann_id": number,
                "category_id": category,
                "image_id": image_id,
                "file_name": file_name.replace(".jpg", f"_{number}.jpg"),
                "split": split,
                "kind": one.kind,  # ours: no reader of RefCOCO minds one more key
                "sent_ids": [number],
                "sentences": [sentence],
            }
        )

    def finish(self) -> None:
        folder = self.root / DATASET
        categories = [{"id": number, "name": name} for name, number in self.categories.items()]
        instances = {"images": self.images, "annotations": self.annotations, "categories": categories}
        write_atomic(folder / "instances.json", json.dumps(instances, separators=(",", ":")))
        pickled = io.BytesIO()
        pickle.Pickler(pickled, protocol=2).dump(self.refs)
        write_atomic(folder / f"refs({SPLIT_BY}).p", pickled.getvalue())


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
