"""The data set ``sentiment``: sentences of film and product reviews, each with the mean of 20 people's ratings from −4 to 4.

Sentences of film reviews are shared out; those of product reviews are ``test_amazon``, another domain that no training sees.
Text alone.
"""

import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic, write_json
from mitrain.data.duplicates import merged
from mitrain_demo.pairs import write_splits
from mitrain_demo.splits import split_groups

INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
MAX_FILE = 64 << 20
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, KeyError)

README = """Sentences with human ratings of their sentiment, made by mitrain from the PyPI source package vaderSentiment 2.5.

C.J. Hutto and E. Gilbert: VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text (ICWSM 2014).
MIT License (see LICENSE.txt). Ratings are the means of 20 people, from -4 (negative) to 4 (positive).

{split}.jsonl: a sentence a line: id, text, target. train, val and test: of film reviews, the same words in one split alone;
test_amazon: of product reviews, but for what film reviews say, too. summary.json: counts, mean and deviation.
"""


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the source package ``archives[0]``. Raises PrepareError."""
    try:
        outer = files_in(archives[0].read_bytes(), (INNER, "LICENSE.txt"))
        inner = files_in(outer[INNER], [f"{name}ReviewSnippets_GroundTruth.txt" for name in ("movie", "amazon")])
        films, products = (rated(content, name) for name, content in inner.items())
    except BROKEN as error:
        raise PrepareError(
            f"{archives[0].name} is not vaderSentiment's source package ({error}): get the original"
        ) from None
    words = [plain(row["text"]) for row in films]
    splits = split_groups(merged(len(films), [], words), f"sentiment {seed}")
    rows = {
        split: [row for row, its in zip(films, splits, strict=True) if its == split] for split in ("train", "val", "test")
    }
    rows["test_amazon"] = [row for row in products if plain(row["text"]) not in set(words)]
    write_atomic(target / "README.txt", README)
    write_atomic(target / "LICENSE.txt", outer["LICENSE.txt"])
    write_splits(target, rows)
    write_json(target / "summary.json", {split: counted(part) for split, part in rows.items()})


def files_in(archive: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """The files of a ``.tar.gz`` whose paths end in ``names``, in this order."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for entry in tar:
            name = next((name for name in names if entry.name.endswith(f"/{name}")), None)
            if name and entry.isreg():
                if entry.size > MAX_FILE:
                    raise ValueError(f"{entry.name!r} is too large")
                found[name] = tar.extractfile(entry).read()
    return {name: found[name] for name in names}


def rated(content: bytes, name: str) -> list[dict]:
    """Lines of id, mean rating and text, tabs between them."""
    rows = []
    for line in content.decode("utf-8").splitlines():
        number, rating, text = line.split("\t", 2)
        rows.append({"id": f"{name.partition('Review')[0]}/{number}", "text": text.strip(), "target": float(rating)})
    return rows


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def counted(rows: Sequence[dict]) -> dict:
    targets = [row["target"] for row in rows]
    mean = sum(targets) / max(1, len(rows))
    deviation = (sum((target - mean) ** 2 for target in targets) / max(1, len(rows))) ** 0.5
    return {"samples": len(rows), "mean": round(mean, 4), "deviation": round(deviation, 4)}
