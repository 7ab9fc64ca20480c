"""The data set ``tuxpaint``: questions and answers about photographs and drawings, split by object.

Four kinds of question about every picture: which category it belongs to, what it is called, yes/no, and where a human
captioned it in a few words, which caption is its own. No object
is in two splits, and neither are its variants (a red and a green apple, a penguin and a little penguin), so that
``val`` and ``test`` ask about things that were never seen in training.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageStat

from mitrain.core.files import write_atomic, write_json
from mitrain_demo.stamps import CATEGORIES, Collection, Stamp, read_stamps

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
DISTRACTORS = 9  # wrong names beside the right one
MARGIN = 0.05  # of the longer side, around the object
LIGHT = 215  # mean brightness (of 255) above which an object would vanish on white
WHITE, SLATE = (255, 255, 255), (96, 112, 128)

CATEGORY_PROMPT = "The thing in this picture belongs to the category of"
NAME_PROMPT = "The name of the thing in this picture is"
CAPTION_PROMPT = "A short description of this picture:"
SHORT = 8  # words of a caption that is asked about
YESNO_PROMPT = "Question: Does this picture show {}? Answer:"
UNCOUNTED = {
    *("broccoli", "corn", "garlic", "lettuce", "red lettuce", "bolted lettuce", "pizza", "ginger root", "hard candy"),
    *("confetti", "lavender", "santa claus", "balsam", "gazania", "appooppan thaadi", "mercury", "venus", "earth"),
    *("mars", "jupiter", "saturn", "uranus", "neptune", "pluto", "measuring tape"),
}

README = """Tux Paint stamps as questions and answers, made by mitrain from the Debian package tuxpaint-stamps-default.

Pictures and captions: the Tux Paint contributors, GPL-2 as a whole (see COPYRIGHT). Cropped, scaled down and put on a
plain ground; names and categories come from the captions and folders, some corrected by hand. The questions, the
wrong names and the splits are drawn from a seed.

{split}.jsonl: one question a line: id, image, prompt, answer, candidates, kind, object.
summary.json: counts and the share of the most frequent answer, which any method must beat.
"""


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian package ``archives[0]``. Raises PrepareError."""
    collection = read_stamps(archives[0])
    splits = split_kinds(collection.stamps, seed)
    write_texts(collection, target, README)
    summary = {}
    for split in SHARES:
        stamps = [stamp for stamp in collection.stamps if splits[stamp.kind] == split]
        questions = ask(stamps, Random(f"questions {seed} {split}"))
        questions += caption_questions(stamps, Random(f"captions {seed} {split}"))
        write_atomic(target / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in questions))
        for stamp in stamps:
            path = target / image_path(stamp)
            path.parent.mkdir(parents=True, exist_ok=True)
            on_plain_ground(stamp.image).save(path)
        summary[split] = summarise(stamps, questions)
    write_json(target / "summary.json", summary)


def write_texts(collection: Collection, target: Path, readme: str) -> None:
    write_atomic(target / "README.txt", readme)
    write_atomic(target / "COPYRIGHT", collection.copyright)


def summarise(stamps: Sequence[Stamp], questions: Sequence[dict]) -> dict:
    answers = Counter(question["answer"] for question in questions if question["kind"] == "category")
    return {
        "images": len(stamps),
        "objects": len({stamp.kind for stamp in stamps}),
        "questions": dict(Counter(question["kind"] for question in questions)),
        "categories": dict(answers.most_common()),
        "majority_share": round(max(answers.values(), default=0) / max(1, answers.total()), 4),
    }


# splits


def split_kinds(stamps: Sequence[Stamp], seed: int) -> dict[str, str]:
    """kind of object → split: each category is shared out like SHARES, with at least one object in every split."""
    sizes = Counter(stamp.kind for stamp in stamps)
    category = {stamp.kind: stamp.category for stamp in reversed(stamps)}  # of the first stamp of that kind
    splits = {}
    for name in sorted(set(category.values())):
        kinds = {kind: size for kind, size in sizes.items() if category[kind] == name}
        splits |= share_out(kinds, Random(f"splits {seed} {name}"))
    return splits


def share_out(sizes: dict[str, int], random: Random) -> dict[str, str]:
    """Draw a split for each kind with a chance proportional to the room left in it (in pictures)."""
    left = {split: max(1.0, share * sum(sizes.values())) for split, share in SHARES.items()}
    kinds = sorted(sizes)
    random.shuffle(kinds)
    kinds.sort(key=lambda kind: sizes[kind] > 1)  # those of one picture first: they open every split
    chosen = {}
    for kind in kinds:
        empty = [split for split in ("train", "test", "val") if split not in chosen.values()]
        fitting = [split for split in SHARES if left[split] >= sizes[kind]] or [max(left, key=left.get)]
        split = empty[0] if empty else random.choices(fitting, [left[split] for split in fitting])[0]
        left[split] -= sizes[kind]
        chosen[kind] = split
    return chosen


# questions


def ask(stamps: Sequence[Stamp], random: Random, wrong: int = DISTRACTORS) -> list[dict]:
    """Every question about these pictures: two of the open kinds and a yes and a no for each.

    A name is asked with ``wrong`` others.
    """
    order = list(stamps)
    random.shuffle(order)
    half = len(order) // 2
    rows = [row for stamp in stamps for row in (category_question(stamp), name_question(stamp, stamps, random, wrong))]
    rows += yesno_questions(order[:half], category_phrase, lambda stamp: stamp.category, random)
    rows += yesno_questions(order[half:], name_phrase, lambda stamp: stamp.kind, random)
    return sorted(rows, key=lambda row: row["id"])


def question(stamp: Stamp, kind: str, prompt: str, answer: str, candidates: Sequence[str]) -> dict:
    return {
        "id": f"{stamp.path.removesuffix('.png')}#{kind}",
        "image": image_path(stamp),
        "prompt": prompt,
        "answer": answer,
        "candidates": list(candidates),
        "kind": kind.split("-")[0],
        "object": stamp.name,
    }


def category_question(stamp: Stamp) -> dict:
    words = [word for word, _ in CATEGORIES.values()]
    return question(stamp, "category", CATEGORY_PROMPT, CATEGORIES[stamp.category][0], words)


def name_question(stamp: Stamp, stamps: Sequence[Stamp], random: Random, wrong: int = DISTRACTORS) -> dict:
    """The right name among names of other kinds of object in the same split."""
    others = sorted({other.name for other in stamps if other.kind != stamp.kind} - {stamp.name})
    candidates = [stamp.name, *random.sample(others, min(wrong, len(others)))]
    random.shuffle(candidates)
    return question(stamp, "name", NAME_PROMPT, stamp.name, candidates)


def caption_questions(stamps: Sequence[Stamp], random: Random, wrong: int = DISTRACTORS) -> list[dict]:
    """The picture's own caption among those of other kinds of object in the same split."""
    short = [stamp for stamp in stamps if stamp.caption and len(stamp.caption.split()) <= SHORT]
    rows = []
    for stamp in short:
        others = sorted({s.caption for s in short if s.kind != stamp.kind} - {stamp.caption})
        candidates = [stamp.caption, *random.sample(others, min(wrong, len(others)))]
        random.shuffle(candidates)
        rows.append(question(stamp, "caption", CAPTION_PROMPT, stamp.caption, candidates))
    return rows


def yesno_questions(stamps: Sequence[Stamp], phrase, key, random: Random) -> list[dict]:
    """A yes and a no for each picture. The noes ask what the yeses ask, so the question alone tells nothing."""
    rows = []
    for stamp, other in zip(stamps, derangement(stamps, key, random), strict=True):
        rows.append(question(stamp, "yesno-yes", YESNO_PROMPT.format(phrase(stamp)), "yes", ("yes", "no")))
        if key(stamp) != key(other):
            rows.append(question(stamp, "yesno-no", YESNO_PROMPT.format(phrase(other)), "no", ("yes", "no")))
    return rows


def derangement(stamps: Sequence[Stamp], key, random: Random) -> list[Stamp]:
    """The same stamps in another order, such that (where that is possible) no place keeps its key."""
    order = sorted(stamps, key=lambda stamp: (key(stamp), stamp.path))
    longest = max(Counter(map(key, order)).values(), default=0)
    shift = random.randint(longest, max(longest, len(order) - longest))
    moved = {id(stamp): order[(place + shift) % len(order)] for place, stamp in enumerate(order)}
    return [moved[id(stamp)] for stamp in stamps]


def category_phrase(stamp: Stamp) -> str:
    return CATEGORIES[stamp.category][1]


def name_phrase(stamp: Stamp) -> str:
    """The name with its article: "an owl", "grapes", "the sun"."""
    name = stamp.name
    if name in ("sun", "moon", "earth"):
        return f"the {name}"
    if name in UNCOUNTED or (name.endswith("s") and not name.endswith(("ss", "us", "is"))):
        return name
    return f"an {name}" if name[0] in "aeio" or name.startswith("umb") else f"a {name}"


# pictures


def image_path(stamp: Stamp) -> str:
    return f"images/{stamp.path}"


def on_plain_ground(image: Image.Image) -> Image.Image:
    """The cut-out in the middle of a square, on white, or on slate where it is too light to be seen on white."""
    brightness = ImageStat.Stat(image.convert("L"), mask=image.getchannel("A")).mean[0]
    side = round(max(image.size) * (1 + 2 * MARGIN))
    ground = Image.new("RGB", (side, side), SLATE if brightness > LIGHT else WHITE)
    ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    return ground
