"""The references of RefCOCO's files, and of gRefCOCO's, whose references have several targets or none.

``DATASET/refs(SPLIT_BY).p`` is a pickled list (written by Python 2), ``refs(SPLIT_BY).json`` or ``grefs(SPLIT_BY).json`` the
same as JSON. A pickle can run any program, so this one is read by an unpickler that knows nothing but plain containers
and values.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mitrain.core import parsing
from mitrain.core.errors import DataError
from mitrain.core.parsing import Unreadable
from mitrain.data.formats.pickles import read_plain
from mitrain.data.formats.rows import PACKED

HUGE = 1 << 63  # no number in these files
NAMES = ("refs({}).p", "refs({}).json", "grefs({}).p", "grefs({}).json")
NO_TARGET = ("-1",)  # gRefCOCO's ann_id of an expression that nothing in the picture fits


@dataclass(frozen=True)
class Reference:
    """``targets``: the annotations that it speaks of; ``sentences``: their ids and cleaned words; ``reference``: a second
    picture's file, if there is one."""

    id: str
    targets: tuple[str, ...]
    image: str
    split: str
    kind: str
    sentences: tuple[tuple[str, str], ...]
    reference: str = ""


def refs_file(root: Path, dataset: str, split_by: str | None) -> Path:
    folder = Path(root) / dataset
    if not folder.is_dir():
        raise DataError(f"no folder {dataset!r} in {str(root)!r}: set data.dataset to the folder that holds refs(*).p")
    there = [path for name in NAMES for path in sorted(folder.glob(name.format("*")))]
    if split_by is None and len(there) == 1:
        return there[0]
    files = [path for path in there if split_of(path) == split_by]
    if len(files) == 1:
        return files[0]
    choices = ", ".join(sorted({split_of(path) for path in there})) or "none"
    wrong = "data.split_by is not set" if split_by is None else f"there is no {NAMES[0].format(split_by)}"
    if files:
        raise DataError(f"{' and '.join(path.name for path in files)} in {str(folder)!r}: remove all but one")
    raise DataError(f"{wrong} in {str(folder)!r}: choose data.split_by from: {choices}")


def split_of(path: Path) -> str:
    return path.stem[path.stem.index("(") + 1 : -1]


def read_bytes(path: Path) -> bytes:
    try:
        content = parsing.read_bytes(path, parsing.DATA_BYTES)
    except Unreadable as error:
        raise DataError(f"{str(path)!r} {error}: this is no annotation file") from None
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error}): put the file there") from None
    if content.startswith(PACKED):
        raise DataError(f"{str(path)!r} is compressed: unpack it")
    return content


def read_json(path: Path) -> Any:
    try:
        return parsing.parse_json(read_bytes(path))
    except Unreadable as error:
        raise DataError(f"{str(path)!r} {error}: get the original file") from None


def once(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Keep what ``read`` made of the last file until that file changes: every split asks for the same one."""

    @lru_cache(maxsize=1)
    def kept(path: Path, changed: int, size: int) -> Any:
        return read(path)

    def reader(path: Path) -> Any:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {str(path)!r} ({error}): put the file there") from None
        return kept(path, stat.st_mtime_ns, stat.st_size)

    return reader


@once
def read_refs(path: Path) -> list[Reference]:
    """The references, each with the fields that we use."""
    refs = read_json(path) if path.suffix == ".json" else read_plain(path, read_bytes(path))
    if not isinstance(refs, list) or not refs:
        raise DataError(f"{str(path)!r} holds {brief(refs)} instead of a list of references: get the original file")
    references = [to_reference(ref, f"{str(path)!r}: reference {number}") for number, ref in enumerate(refs)]
    seen: set[tuple[str, str]] = set()
    for ref in references:
        for sentence, _ in ref.sentences:
            if (ref.id, sentence) in seen:
                raise DataError(
                    f"{str(path)!r}: ref_id={ref.id[:80]} with sent_id={sentence[:80]} stands twice: make ids unique"
                )
            seen.add((ref.id, sentence))
    return references


def to_reference(ref: Any, where: str) -> Reference:
    targets = ref.get("ann_id") if isinstance(ref, dict) else None
    several = [id_of({"ann_id": one}, "ann_id", where) for one in targets] if isinstance(targets, list) else None
    sentences = []
    number, image = id_of(ref, "ref_id", where), id_of(ref, "image_id", where)
    targets = tuple(dict.fromkeys(several)) if several is not None else (id_of(ref, "ann_id", where),)
    for sentence in field(ref, "sentences", list, where):
        field(sentence, "sent", str, where)
        sentences.append((id_of(sentence, "sent_id", where), words(sentence)))
    return Reference(
        number,
        () if targets == NO_TARGET else targets,
        image,
        field(ref, "split", str, where),
        ref["kind"] if isinstance(ref.get("kind"), str) else "",
        tuple(sentences),
        field({"reference": "", **ref}, "reference", str, where),
    )


def words(sentence: Mapping[str, Any]) -> str:
    """The cleaned sentence, or the raw one where cleaning left nothing."""
    raw = sentence.get("raw", "")
    return sentence["sent"].strip() or (raw.strip() if isinstance(raw, str) else "")


def id_of(record: Any, key: str, where: str) -> str:
    """An id as text: tools write the same one as 1, 1.0 or "1"."""
    value = field(record, key, int | float | str, where)
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"{where} has the impossible {key}={brief(value)}: get the original file")
        value = int(value)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value))


def field(record: Any, key: str, kind: Any, where: str) -> Any:
    """``record[key]``, if it is there and of that kind."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is {brief(record)} instead of a dictionary: get the original file")
    if key not in record:
        raise DataError(f"{where} has no {key!r}: get the original file")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int | float) and not abs(value) < HUGE):
        raise DataError(f"{where} has the impossible {key}={brief(value)}: get the original file")
    return value


def brief(value: Any) -> str:
    """A value in a few characters, whatever it is."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, int | float | None) and abs(value or 0) < HUGE:
        return repr(value)
    return f"a {type(value).__name__}"
