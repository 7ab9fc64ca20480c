"""MM-IMDB: film posters with plots, several of 23 genres each.

``split.json`` {train, dev, test: [id]}; for each id ``dataset/ID.json`` (or ``labels/ID.json``) with ``plot`` (a list of
texts) and ``genres``, and ``ID.jpeg`` in ``dataset/`` or ``images/``. As MMBT reads it: the longest plot; a film with a
genre outside the 23 (News, which training has, and a few that only dev and test have) is left out.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.labels import LabelSample, check_known, counted
from mitrain.data.formats.rows import folder_in, read_table, unique

GENRES = (
    *("Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery"),
    *("Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western"),
    *("Sport", "Short", "Film-Noir"),
)
CANONICAL = {genre.casefold(): genre for genre in GENRES}
SPLITS = {"train": "train", "val": "dev", "dev": "dev", "test": "test"}
ANNOTATIONS, PICTURES = ("dataset", "labels"), ("dataset", "images")


def read_mmimdb(root: Path, split: str, known: Collection[str] = GENRES) -> list[LabelSample]:
    """A split's films in the file's order; those that are left out are counted by reason.

    Raises DataError, also where a film has one of the 23 genres that is not among those ``known``.
    """
    root = Path(root)
    if split not in SPLITS:
        raise DataError(f"MM-IMDB has no split {split!r}: choose one of {', '.join(SPLITS)}")
    left_out: Counter[str] = Counter()
    rows = films(root, SPLITS[split], left_out)
    samples = unique((place, film) for place, film in rows if check_known(film.labels, known, place))
    nothing = f"{str(root)!r} has no usable film in the split {split!r}: get the original files"
    return counted(samples, left_out, f"{root}: {split}", nothing)


def split_names(root: Path) -> list[str]:
    there = read_table(root / "split.json")
    return [split for split in ("train", "val", "test") if SPLITS[split] in there]


def films(root: Path, split: str, left_out: Counter) -> Iterator[tuple[str, LabelSample]]:
    where = root / "split.json"
    ids = read_table(where).get(split)
    if not isinstance(ids, list):
        raise DataError(f"{str(where)!r} has no list {split!r}: get the original file")
    mend = "put the original files there"
    notes, pictures = (folder_in(root, names, mend, "folder") for names in (ANNOTATIONS, PICTURES))
    for number, film in enumerate(ids):
        film = id_of(film, f"{where}: {split} {number}")
        path = root / notes / f"{film}.json"
        facts = read_table(path)
        genres = texts(facts.get("genres"), f"{str(path)!r}: genres")
        genres = [CANONICAL.get(genre.strip().casefold(), genre) for genre in genres]
        plot = max(texts(facts.get("plot", []), f"{str(path)!r}: plot"), key=len, default="")
        outside = sorted(set(genres) - set(GENRES))
        reason = f"of the genre {outside[0]}" if outside else "" if genres else "without a genre"
        if reason or not plot.strip():
            left_out[reason or "without a plot"] += 1
            continue
        labels = tuple(genre for genre in GENRES if genre in genres)
        yield (f"{where}: {split} {number}", LabelSample(film, {"image": f"{pictures}/{film}.jpeg"}, plot.strip(), labels))


def id_of(value: Any, where: str) -> str:
    """An id as the files are named: seven digits, of which a number has lost its zeros."""
    text = f"{value:07d}" if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12 else value
    if not isinstance(text, str) or not text.isalnum() or len(text) > 40:
        raise DataError(f"{where} is {str(value)[:40]!r}, which is no film's id: get the original file")
    return text


def texts(value: Any, where: str) -> list[str]:
    """A list of texts; one text alone counts as such."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where} is no list of texts: get the original file")
    return value
