"""Files in a folder for each class, as ImageFolder and Hugging Face's imagefolder and audiofolder have them."""

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from mitrain.core.config import nearest
from mitrain.core.errors import DataError
from mitrain.data.formats.labels import LabelSample, counted
from mitrain.data.kinds import BY_ENDING


def read_folders(root: Path, folder: str, name: str, known: Collection[str] = ()) -> list[LabelSample]:
    """A sample for every file below ``root/folder/CLASS/``, labelled CLASS, in the order of their names.

    ``name``: of the input that the files are. Hidden files and files of no known kind are left out and counted. Raises
    DataError where a class holds none, where there is no class, or one that is not ``known`` (where any are).
    """
    top = Path(root) / folder
    classes = sorted(path.name for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
    classes = [one for one in classes if not one.startswith(".")]
    if not classes:
        raise DataError(f"no folder of a class in {str(top)!r}: give one for each class, with its files")
    samples, left_out = [], Counter()
    for label in classes:
        if known and label not in known:
            raise DataError(f"{str(top / label)!r}: the class {label!r}{nearest(label, known)} is not one of training's")
        paths = [path for path in sorted((top / label).rglob("*")) if path.is_file()]
        usable = [path for path in paths if path.suffix.lower() in BY_ENDING and not path.name.startswith(".")]
        left_out["of no known kind"] += len(paths) - len(usable)
        if not usable:
            raise DataError(
                f"{str(top / label)!r} holds no pictures, sound or other files that are read: remove it or fill it"
            )
        for path in usable:
            file = os.path.relpath(path, root)
            samples.append(LabelSample(file, {name: file}, "", (label,)))
    return counted(samples, +left_out, str(top), "")
