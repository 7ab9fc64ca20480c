"""The data set ``tuxpaint-scenes``: referring expressions about composed scenes, in RefCOCO's own files.

The pictures are real (photographs and drawings with human captions) and the masks exact; that they stand together on
drawn backgrounds is not. Splits: ``train``; ``val``, the same objects in new scenes; ``testA``, objects never seen in
training; ``testB``, cartoon drawings, of which training shows none.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from tqdm import tqdm

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic, write_json
from mitrain_demo.compose import OPAQUE, Style, Thing, scene
from mitrain_demo.refcoco_files import RefCocoWriter
from mitrain_demo.stamps import Stamp, read_stamps
from mitrain_demo.tuxpaint import split_kinds

NAME = "tuxpaint-scenes"
SCENES = {"train": 1200, "val": 150, "testA": 150, "testB": 150}
FEWEST = 3  # things that make a scene
ENOUGH = 160  # pixels: larger stamps are scaled down once
SMALLEST = 45  # pixels of a stamp's longer side: smaller ones would be blurred
FILLED = 0.12  # of the square around a stamp that it must cover: thin things make no target
SOFT = 0.4  # of what can be seen that may be half transparent: glows and shadows have no edge
LOOKALIKES = ("animals/", "plants/")  # whose folders hold things that a layman gives one name

README = """Composed scenes of Tux Paint stamps, made by mitrain from the Debian package tuxpaint-stamps-default.

Pictures and captions: the Tux Paint contributors, GPL-2 as a whole (see COPYRIGHT). Cut out, scaled, mirrored and put
together on drawn backgrounds at random from a seed; the expressions come from the captions by a few templates.

refcoco/refs(unc).p, refcoco/instances.json, images/mscoco/images/train2014: RefCOCO's own layout, nothing of its data.
summary.json: counts.
"""


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian package ``archives[0]``. Raises PrepareError."""
    collection = read_stamps(archives[0])
    things = share_things(collection.stamps, seed)
    write_atomic(target / "README.txt", README)
    write_atomic(target / "COPYRIGHT", collection.copyright)
    write_scenes(target, NAME, things, SCENES, Style(), seed)


def write_scenes(
    target: Path, name: str, things: dict[str, list[Thing]], scenes: dict[str, int], style: Style, seed: int
) -> None:
    """Compose ``scenes[split]`` scenes of ``things[split]`` for each split, and a summary."""
    writer = RefCocoWriter(target)
    summary = {}
    for split, count in scenes.items():
        if len(things.get(split, ())) < FEWEST:
            raise PrepareError(f"too few usable stamps for the split {split} of {name}: give the whole package")
        random = Random(f"{name} {seed} {split}")
        first = len(writer.refs)
        for _ in tqdm(range(count), f"{name} {split}", unit=" scenes", disable=None):
            writer.add(split, *scene(things[split], style, random))
        summary[split] = summarise(writer, first, things[split])
    writer.finish()
    write_json(target / "summary.json", summary)


def summarise(writer: RefCocoWriter, first: int, things: Sequence[Thing]) -> dict:
    texts = [ref["sentences"][0]["sent"] for ref in writer.refs[first:]]
    areas = [annotation["area"] for annotation in writer.annotations[first:]]
    pixels = writer.images[-1]["height"] * writer.images[-1]["width"]
    return {
        "scenes": len({ref["image_id"] for ref in writer.refs[first:]}),
        "objects": len({thing.name for thing in things}),
        "expressions": len(texts),
        "unique_expressions": len(set(texts)),
        "kinds": dict(Counter(ref["kind"] for ref in writer.refs[first:])),
        "mean_area": round(float(np.mean(areas)) / pixels, 4),
    }


def share_things(stamps: Sequence[Stamp], seed: int) -> dict[str, list[Thing]]:
    """split → its objects. What ``tuxpaint`` holds out of training, with the same seed, is held out here too."""
    splits = split_kinds(stamps, seed)
    things = defaultdict(list)
    for stamp in filter(is_target, stamps):
        split = "testB" if stamp.cartoon else "train" if splits[stamp.kind] == "train" else "testA"
        image = stamp.image.copy()
        image.thumbnail((ENOUGH, ENOUGH), Image.Resampling.LANCZOS)
        things[split].append(Thing(stamp.name, family(stamp), image))
    return things | {"val": things["train"]}


def is_target(stamp: Stamp) -> bool:
    """Whether the stamp is large, full and sharp enough to be segmented."""
    alpha = np.asarray(stamp.image.getchannel("A"))
    longest = max(alpha.shape)
    solid = int((alpha >= OPAQUE).sum())
    return longest >= SMALLEST and solid >= FILLED * longest**2 and (alpha > 0).sum() - solid <= SOFT * solid


def family(stamp: Stamp) -> frozenset[str]:
    folder = stamp.path.rpartition("/")[0].removesuffix("/cartoon")
    return frozenset({stamp.kind, folder} if folder.startswith(LOOKALIKES) else {stamp.kind})
