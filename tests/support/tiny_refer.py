"""Referring data as its authors published it: written by Python 2, with polygons and run lengths."""

import json
import struct
from pathlib import Path

from PIL import Image

SQUARE = [[2.0, 1.0, 8.0, 1.0, 8.0, 5.0, 2.0, 5.0]]  # 6 wide, 4 high


def python2_pickle(value, protocol: int) -> bytes:
    """What Python 2's cPickle writes: byte strings for ``str``, with protocol 0 or 2."""
    return (b"\x80\x02" if protocol == 2 else b"") + b"".join(opcodes(value, protocol)) + b"."


def opcodes(value, protocol: int):
    if isinstance(value, str):
        data = value.encode("latin1")
        text = "'" + data.decode("latin1").encode("unicode_escape").decode().replace("'", "\\'") + "'"
        yield b"T" + struct.pack("<i", len(data)) + data if protocol else b"S" + text.encode() + b"\n"
    elif isinstance(value, int):
        yield b"J" + struct.pack("<i", value) if protocol else f"I{value}\n".encode()
    elif isinstance(value, list):
        yield b"]" if protocol else b"(l"
        for item in value:
            yield from opcodes(item, protocol)
            yield b"a"
    else:
        yield b"}" if protocol else b"(d"
        for key, item in value.items():
            yield from opcodes(key, protocol)
            yield from opcodes(item, protocol)
            yield b"s"


def ref(number: int, split: str, *sentences: str, image: int = 1) -> dict:
    return {
        "ref_id": number,
        "ann_id": 100 + number,
        "category_id": 7,
        "image_id": image,
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        "split": split,
        "sent_ids": [10 * number + i for i in range(len(sentences))],
        "sentences": [
            {"sent_id": 10 * number + i, "sent": text, "raw": text.upper(), "tokens": text.split()}
            for i, text in enumerate(sentences)
        ],
    }


def annotation(number: int, segmentation, image: int = 1) -> dict:
    return {
        "id": 100 + number,
        "image_id": image,
        "category_id": 7,
        "bbox": [2, 1, 6, 4],
        "area": 24,
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def refer_folder(
    root: Path,
    refs: list[dict],
    annotations: list[dict],
    dataset: str = "refcoco",
    split_by: str = "unc",
    images: str = "images/mscoco/images/train2014",
    protocol: int = 2,
) -> Path:
    """A data root with one data set; the pictures are 12 x 9."""
    folder, pictures = root / dataset, root / images
    folder.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(python2_pickle(refs, protocol))
    names = {number: f"COCO_train2014_{number:012d}.jpg" for number in {1, *(a["image_id"] for a in annotations)}}
    tables = {
        "info": {"year": 2014},
        "images": [{"id": n, "file_name": name, "height": 9, "width": 12} for n, name in names.items()],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "person", "supercategory": "person"}],
    }
    (folder / "instances.json").write_text(json.dumps(tables))
    for name in names.values():
        Image.new("RGB", (12, 9), "grey").save(pictures / name)
    return root
