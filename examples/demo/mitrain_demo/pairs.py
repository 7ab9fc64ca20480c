"""Files of prepared pictures with texts: labelled JSONL, and retrieval in Karpathy's JSON."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mitrain.core.files import write_atomic, write_json

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # split → records with image, text, label, object


def write_splits(target: Path, rows: Rows) -> None:
    """``{split}.jsonl``: one record a line."""
    for split, records in rows.items():
        write_atomic(target / f"{split}.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def write_karpathy(target: Path, name: str, rows: Rows) -> None:
    """``dataset_NAME.json``: every picture of ``rows`` once with all its texts.

    ``filename`` is the picture's path below the folder; ``object`` is ours: what two splits must not share.
    """
    images: dict[str, dict[str, Any]] = {}
    sentences = 0
    for split, records in rows.items():
        for record in records:
            new = {"filename": record["image"], "imgid": len(images), "split": split, "object": record["object"]}
            image = images.setdefault(record["image"], new | {"sentids": [], "sentences": []})
            image["sentids"].append(sentences)
            tokens = record["text"].lower().rstrip(".!?").split()
            sentence = {"raw": record["text"], "tokens": tokens, "imgid": image["imgid"], "sentid": sentences}
            image["sentences"].append(sentence)
            sentences += 1
    write_atomic(target / f"dataset_{name}.json", json.dumps({"dataset": name, "images": list(images.values())}))


def write_summary(target: Path, rows: Rows) -> None:
    """``summary.json``: `summary_of` the splits."""
    write_json(target / "summary.json", summary_of(rows))


def summary_of(rows: Rows) -> dict[str, dict[str, Any]]:
    """Counts of every split, and the share of its commonest label."""
    summary = {}
    for split, records in rows.items():
        labels = Counter(label for record in records for label in labels_of(record))
        summary[split] = {
            "samples": len(records),
            "images": len({record["image"] for record in records}),
            "texts": len({record["text"] for record in records}),
            "objects": len({record["object"] for record in records}),
            "labels": dict(labels.most_common()),
            "majority_share": round(max(labels.values(), default=0) / max(1, len(records)), 4),
        }
    return summary


def labels_of(record: Mapping[str, Any]) -> list[str]:
    label = record.get("label", [])
    return [label] if isinstance(label, str) else list(label)
