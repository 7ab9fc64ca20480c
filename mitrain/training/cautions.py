"""What of a split's score cannot be wrong, or not be right, whatever a model says: told before it is taken for a result."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.formats.labels import LabelSample, look_alikes
from mitrain.data.formats.records import AnswerSample
from mitrain.tasks.answer import MOST_ANSWERS
from mitrain.tasks.ranks import Gallery

SHOWN = 5  # pairs of answers that are named


def cautions(samples: Sequence[Any], split: str, known: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """One line for each thing that decides a part of the score by itself.

    ``known``: the answers of training by their prompts, where they are known.

    Raises:
        DataError: the whole score is decided, so that nothing is measured.
    """
    if not samples:
        raise DataError(f"{split} holds no sample, so that nothing is scored: give a split that has some")
    if isinstance(samples[0], AnswerSample):
        return of_answers(samples, split, known or {})
    if isinstance(samples[0], LabelSample):
        return of_labels(samples, split)
    return of_captions(samples, split) if isinstance(samples[0], CaptionSample) else of_masks(samples, split)


def of_answers(samples: Sequence[Any], split: str, known: Mapping[str, Sequence[str]]) -> list[str]:
    answers = [sample.answer for sample in samples]
    alike = look_alikes(dict.fromkeys(answers))
    found = [f"{split}: the answers {one} and {other} count as two" for one, other in alike[:SHOWN]]
    found += only_one(answers, split, "answer")
    without = [sample for sample in samples if len(set(sample.candidates)) < 2]
    if not without:
        return found
    ranked = [sample for sample in without if 1 < len(known.get(sample.prompt, ())) <= MOST_ANSWERS]
    unseen = sum(sample.answer not in known[sample.prompt] for sample in ranked)
    one = sum(len(sample.candidates) > 0 for sample in without)
    found.append(
        f"{split}: {len(without)} of {len(samples)} samples offer no choice ({one} have one candidate, which cannot be"
        f" wrong): {len(ranked)} are ranked among the training answers to their prompt, {len(without) - len(ranked)} are"
        " right where the model says the answer"
    )
    if unseen:
        found.append(f"{split}: {unseen} samples have an answer that training never gave to their prompt: always wrong")
    return found


def of_labels(samples: Sequence[Any], split: str) -> list[str]:
    sets = [frozenset(sample.labels) for sample in samples]
    if not any(sets):
        raise DataError(f"{split}: no sample has a label, so that no prediction can be right: give labels")
    names = frozenset().union(*sets)
    if len(names) > 1 and all(labels == names for labels in sets):
        return [f"{split}: every sample has all {len(names)} labels, so that always naming all is right every time"]
    return only_one([", ".join(sorted(labels)) for labels in sets], split, "label")


def only_one(values: Sequence[str], split: str, what: str) -> list[str]:
    """A line where all samples have the same answer or label."""
    counts = Counter(values)
    if len(counts) > 1:
        return []
    return [
        f"{split}: every sample has the {what} {values[0][:60]!r}, so that always giving it is right every time:"
        " a score says nothing of the pictures"
    ]


def of_captions(samples: Sequence[Any], split: str) -> list[str]:
    gallery = Gallery([sample.image for sample in samples], [sample.text for sample in samples])
    decided = gallery.decided()
    if len(decided) == len(gallery.depths()):
        raise DataError(
            f"{split}: {len(gallery.images)} image(s) and {len(set(gallery.texts))} different text(s) leave nothing that a"
            " ranking could get wrong: give more"
        )
    if not decided:
        return []
    return [
        f"{split}: {', '.join(decided)} cannot be wrong among {len(gallery.images)} images and {len(gallery.texts)} texts"
        " and are left out of recall_mean"
    ]


def of_masks(samples: Sequence[Any], split: str) -> list[str]:
    masks = [sample.mask() for sample in samples if not sample.fault()]
    empty, full = sum(not mask.any() for mask in masks), sum(bool(mask.all()) for mask in masks)
    if empty == len(masks):
        raise DataError(f"{split}: no mask has an object in it, so that every IoU is 0: give annotations with objects")
    found = [f"{split}: {empty} of {len(masks)} masks are empty; their IoU is 0 whatever is found"] if empty else []
    if full == len(masks):
        found.append(f"{split}: every mask covers its whole picture, so that marking all is right every time")
    return found
