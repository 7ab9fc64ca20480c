"""Questions and captions on COCO's pictures, in the files that VQA and COCO are published in; by ``SUBSET``, as train2014.

VQA (v1, v2, OK-VQA): ``*_SUBSET_questions.json`` {"questions": [{"question_id", "image_id", "question"}]} and
``*_SUBSET_annotations.json`` {"annotations": [{"question_id", "answers": [{"answer"}], "multiple_choice_answer",
"answer_type"}]}. Captions: ``captions_SUBSET.json`` {"images": [{"id", "file_name"}], "annotations": [{"image_id", "id",
"caption"}]}. They lie in the data's folder or one below it, the pictures in ``SUBSET/`` or ``images/SUBSET/``.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from sys import intern
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.captions import FIRST, CaptionSample, image_folder, with_captions
from mitrain.data.formats.labels import counted
from mitrain.data.formats.records import AnswerSample, commonest
from mitrain.data.formats.references import field, id_of
from mitrain.data.formats.rows import list_in, unique

QUESTIONS, ANSWERS, CAPTIONS = "*_{}_questions.json", "*_{}_annotations.json", "captions_{}.json"


def file_of(root: Path, pattern: str, subset: str) -> Path:
    """The one file of a ``subset``; DataError where there is none, or several."""
    name = pattern.format(subset)
    found = files_of(root, name)
    if not found:
        raise DataError(f"no file {name} in {str(root)!r} or a folder below it: put it there, or correct data.subsets")
    if len(found) > 1:
        there = ", ".join(str(path.relative_to(root)) for path in found)
        raise DataError(f"{len(found)} files {name} in {str(root)!r} ({there}): keep the one that is meant")
    return found[0]


def files_of(root: Path, name: str) -> list[Path]:
    return sorted([*Path(root).glob(name), *Path(root).glob(f"*/{name}")])


def subsets_there(root: Path, pattern: str, subsets: Mapping[str, str]) -> list[str]:
    """The splits whose files are there; all of them where none is."""
    return [split for split, name in subsets.items() if files_of(root, pattern.format(name))] or list(subsets)


def folders(subset: str) -> tuple[str, ...]:
    return (subset, f"images/{subset}", "images", "")


def read_vqa(root: Path, subset: str, images: str | None = None) -> list[AnswerSample]:
    """A subset's questions in the file's order with all their answers; those without one are left out, and counted.

    Raises DataError naming file and question.
    """
    path, left_out = file_of(root, QUESTIONS, subset), Counter()
    answered = answers_of(file_of(root, ANSWERS, subset))
    questions = list_in(path, "questions")
    numbers = [picture_id(question, f"{path}: question {n}") for n, question in enumerate(questions)]
    rows = zip(questions, pictures_of(root, subset, numbers, images), strict=True)
    samples = unique(asked(path, rows, answered, left_out))
    return counted(samples, left_out, str(path), f"{str(path)!r} has no question that is answered: get both original files")


def pictures_of(root: Path, subset: str, numbers: list[int], images: str | None) -> list[str]:
    """The pictures' paths, by the names that COCO's files had until 2014 or since 2017, whichever are there."""

    def under(pattern: str) -> list[str]:
        names = [pattern.format(number) for number in numbers]
        folder = image_folder(Path(root), names[:FIRST], images, folders(subset))
        return [f"{folder}{name}" for name in names]

    with suppress(DataError):
        return under("{:012d}.jpg")
    return under(f"COCO_{subset}_{{:012d}}.jpg")


def picture_id(question: Any, where: str) -> int:
    number = id_of(question, "image_id", where)
    if not number.isdecimal() or len(number) > 12:
        raise DataError(f"{where} has the impossible image_id={number[:40]!r}: get the original file")
    return int(number)


def answers_of(path: Path) -> dict[str, dict[str, Any]]:
    """The annotations by their questions' ids."""
    annotations = list_in(path, "annotations")
    return {id_of(one, "question_id", f"{path}: annotation {n}"): one for n, one in enumerate(annotations)}


def asked(
    path: Path, rows: Iterator[tuple[Any, str]], answered: dict[str, dict[str, Any]], left_out: Counter
) -> Iterator[tuple[str, AnswerSample]]:
    for n, (question, picture) in enumerate(rows):
        where = f"{path}: question {n}"
        number, text = id_of(question, "question_id", where), field(question, "question", str, where).strip()
        if not text:
            raise DataError(f"{where} has an empty question: get the original file")
        if number not in answered:
            left_out["without an answer"] += 1
            continue
        answers, usual, kind = people(answered[number], f"the annotation of question_id={number}")
        if not usual:
            left_out["with an empty answer"] += 1
            continue
        yield (where, AnswerSample(number, {"image": picture}, text, usual, kind=kind, object=picture, references=answers))


def people(annotation: dict[str, Any], where: str) -> tuple[tuple[str, ...], str, str]:
    """All people's answers, the commonest one, and of which kind they are."""
    given = field(annotation, "answers", list, where)
    answers = tuple(intern(field(one, "answer", str, where).strip()) for one in given)
    usual = annotation.get("multiple_choice_answer") or (commonest(answers) if answers else "")
    kind = annotation.get("answer_type") or ""
    if not isinstance(usual, str) or not isinstance(kind, str):
        raise DataError(f"{where} has an impossible multiple_choice_answer or answer_type: get the original file")
    return answers, intern(usual.strip()), intern(kind)


def read_coco_captions(root: Path, subset: str, images: str | None = None) -> Sequence[CaptionSample]:
    """A subset's captions in the file's order; wordless ones are left out, and counted."""
    path, left_out = file_of(root, CAPTIONS, subset), Counter()
    pictures = {
        id_of(one, "id", where := f"{path}: image {n}"): field(one, "file_name", str, where)
        for n, one in enumerate(list_in(path, "images"))
    }
    folder = image_folder(Path(root), list(pictures.values())[:FIRST], images, folders(subset))
    samples = unique(captions_in(path, pictures, folder, left_out))
    return with_captions(counted(samples, left_out, str(path), f"{str(path)!r} has no caption: get the original file"))


def captions_in(path: Path, pictures: dict[str, str], folder: str, left_out: Counter) -> Iterator[tuple[str, CaptionSample]]:
    for n, one in enumerate(list_in(path, "annotations")):
        where = f"{path}: annotation {n}"
        picture, number = id_of(one, "image_id", where), id_of(one, "id", where)
        if picture not in pictures:
            raise DataError(f"{where} is of the image {picture[:40]}, which 'images' has not: get the original file")
        text = " ".join(field(one, "caption", str, where).split())
        if not text:
            left_out["wordless captions"] += 1
            continue
        yield where, CaptionSample(number, {"image": f"{folder}{pictures[picture]}"}, text, picture)
