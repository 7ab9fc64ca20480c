"""Referring expressions of one's own in COCO's JSON: what an annotation speaks of is its mask.

``{"images": [{"id", "file_name", "height", "width"}], "annotations": [{"id", "image_id", "segmentation", "expression"}],
"categories": [{"id", "name"}]}``. An annotation's expressions stand under any of `NAMES`, as a text or a list of texts; one
without any is an object of its picture and no sample. ``segmentation``: polygons or run lengths; ``categories`` may lack; an
annotation's ``reference`` is the file of a second picture, the input of that name.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.captions import FIRST, image_folder
from mitrain.data.formats.manifest import Manifest
from mitrain.data.formats.refcoco import Instances, ReferSample, looked_up, size_of
from mitrain.data.formats.references import brief, field, id_of
from mitrain.data.formats.rows import as_text, unique

NAMES = ("expression", "expressions", "caption", "captions", "sentences", "phrase", "referring")


def read_expressions(source: Manifest, name: str | None = None, images: str | None = None) -> list[ReferSample]:
    """A sample for every expression, in the file's order.

    ``name``: the key of an annotation that has its expressions, where it is none of `NAMES` or several are there;
    ``images``: the pictures' folder below the data's. Raises DataError naming file and annotation of the first fault.
    """
    (path,) = source.files()
    tables = Instances(path)
    folder = image_folder(Path(source.root), [str(one.get("file_name")) for one in tables.images.values()][:FIRST], images)
    samples = unique(expressions_in(path, tables, folder, name))
    if not samples:
        raise DataError(
            f"{str(path)!r}: no annotation has an expression ({name or ', '.join(NAMES)}): write one beside its"
            " segmentation, or name its key with data.expression"
        )
    return samples


def expressions_in(path: Path, tables: Instances, folder: str, name: str | None) -> Iterator[tuple[str, ReferSample]]:
    for number, annotation in tables.annotations.items():
        where = f"{str(path)!r}: annotation {number[:80]}"
        texts = texts_of(annotation, name, where)
        if not texts:
            continue
        image_id = id_of(annotation, "image_id", where)
        image = looked_up(tables.images, image_id, "image_id", where, tables.where)
        shape = field(annotation, "segmentation", list | dict, where)
        size = size_of(image, f"{tables.where!r}: image {image_id[:80]}")
        there = {"image": folder + field(image, "file_name", str, where)}
        if annotation.get("reference"):
            there["reference"] = folder + field(annotation, "reference", str, where)
        known = tables.category(annotation), "", tables.present.get(image_id, ())
        for n, text in enumerate(texts):
            own = f"{number}/{n}" if len(texts) > 1 else number
            yield where, ReferSample(own[:200], there, text, size, shape, *known)


def texts_of(annotation: Mapping[str, Any], name: str | None, where: str) -> list[str]:
    """The words of an annotation; none where it is no sample."""
    keys = [key for key in ((name,) if name else NAMES) if annotation.get(key)]
    if len(keys) > 1:
        raise DataError(f"{where} has {' and '.join(keys)}: say which holds the expressions with data.expression")
    if not keys:
        return []
    value = annotation[keys[0]]
    values = value if isinstance(value, list) else [value]
    values = [one.get("raw", one.get("sent")) if isinstance(one, dict) else one for one in values]
    if not all(isinstance(one, str) for one in values):
        raise DataError(f"{where} has the impossible {keys[0]}={brief(value)}: give a text or a list of texts")
    return [text for one in values if (text := as_text(one, keys[0], where))]
