"""The data set ``dialogue``: acted English lines of the adventure game *Flight of the Amazon Queen*, split by dialogue.

Three tasks: which sentence mode a line has, from its words without punctuation and its voice; who speaks; which line a clip
says. The labels are the script's own punctuation and its files' names; it is no data of sentiment.

``queen.1c``: "QTBL", 9 bytes, u16 count, then per entry a name of 12 bytes, u8, u32 offset, u32 size; numbers are
big-endian. A name in ``.SB`` is a clip in MP3, one in ``.DOG`` a dialogue of the hero with somebody.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic, write_json
from mitrain_demo.deb import members
from mitrain_demo.packages import QUEEN
from mitrain_demo.pairs import write_splits
from mitrain_demo.splits import split_groups

HERO = "joe"
HEAD = 20  # bytes of a dialogue before its numbers
GESTURE = re.compile(r"\*(?:XY.{11}|..)")  # what the actor does, between two clips
ENDS = {".": "statement", "?": "question", "!": "exclamation", "...": "unfinished"}
SHARES = {"train": 0.7, "test": 0.2, "val": 0.1}  # of two dialogues with somebody one is in training, one in test
FEWEST = 10  # clips in training of a character that is asked for

README = """Spoken lines of the game Flight of the Amazon Queen, made by mitrain from the Debian package
flight-of-the-amazon-queen.

ACTED DIALOGUE OF A FREE GAME. Labels are the script's own punctuation and the names of its files; nobody annotated them, and
they are NOT SENTIMENT. Copyright John Passfield and Steven Stamatiadis; this is a MODIFIED VERSION of the game's data: clips
are cut out as they are (MP3), texts without their stage directions. See COPYRIGHT, which must stay with it.

Whole dialogues are held out, and no line (but for case and punctuation) is in two splits.

{split}.jsonl: a clip a line: id, speech, text (as written), label (who speaks), object (the dialogue).
mode-{split}.jsonl: text in lower case without punctuation; label by how the script ends the line: statement (.),
question (?), exclamation (!), unfinished (...). Other lines are left out.
character-{split}.jsonl: no text; the characters that have at least 10 clips in training and some in test.
summary.json: counts, and the share of the commonest label.
"""


@dataclass(frozen=True)
class Clip:
    """A spoken line. ``dialogue``: the script's file that it is from."""

    name: str
    text: str
    speaker: str
    dialogue: str

    @property
    def words(self) -> str:
        """The text in lower case, without punctuation."""
        return plain_words(self.text)

    @property
    def mode(self) -> str | None:
        """What the last mark of the text says."""
        end = re.search(r"(\.\.\.|[.?!])[^\w.?!]*$", self.text)
        return ENDS[end[1]] if end else None


def plain_words(text: str) -> str:
    """``text`` in lower case, without punctuation."""
    return " ".join(re.sub(r"[^\w']|_|(?<!\w)'|'(?!\w)", " ", text.lower()).split())


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian package ``archives[0]``. Raises PrepareError."""
    files, copyright = read_package(archives[0])
    try:
        clips = sorted(clips_of(files), key=lambda clip: clip.name)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise PrepareError(f"{archives[0].name} holds a torn dialogue ({error}): get the original package") from None
    if len({clip.dialogue for clip in clips}) < len(SHARES):
        raise PrepareError(f"{archives[0].name} holds {len(clips)} spoken lines: get the original package")
    parts = parted(clips, seed)
    (target / "clips").mkdir()
    for clip in (clip for part in parts.values() for clip in part):
        write_atomic(target / "clips" / f"{clip.name}.mp3", files[f"{clip.name}.SB"])
    write_atomic(target / "README.txt", README)
    write_atomic(target / "COPYRIGHT", copyright)
    asked = characters(parts)
    tables = {"": {}, "mode-": {}, "character-": {}}
    for split, part in parts.items():
        tables[""][split] = [record(c, c.text, c.speaker) for c in part]
        tables["mode-"][split] = [record(c, c.words, c.mode) for c in part if c.mode and c.words]
        tables["character-"][split] = [record(c, "", c.speaker) for c in part if c.speaker in asked]
    for prefix, table in tables.items():
        write_splits(target, {prefix + split: rows for split, rows in table.items()})
    write_json(target / "summary.json", {p + s: counted(rows) for p, table in tables.items() for s, rows in table.items()})


def record(clip: Clip, text: str, label: str) -> dict[str, str]:
    return {
        "id": clip.name,
        "speech": f"clips/{clip.name}.mp3",
        "text": text,
        "label": label,
        "object": clip.dialogue,
    }


def counted(rows: Sequence[Mapping[str, str]]) -> dict:
    labels = Counter(row["label"] for row in rows)
    return {
        "samples": len(rows),
        "objects": len({row["object"] for row in rows}),
        "labels": dict(labels.most_common()),
        "majority_share": round(max(labels.values(), default=0) / max(1, len(rows)), 4),
    }


# splits


def parted(clips: Sequence[Clip], seed: int) -> dict[str, list[Clip]]:
    """The clips of each split: every character's dialogues are shared out, and a line that is said in several splits stays
    in the smallest of them alone."""
    splits: dict[str, str] = {}
    for name in sorted({character(clip.dialogue) for clip in clips}):
        files = [clip.dialogue for clip in clips if character(clip.dialogue) == name]
        splits |= zip(files, split_groups(files, f"{QUEEN} {seed} {name}", SHARES), strict=True)
    parts = {split: [clip for clip in clips if splits[clip.dialogue] == split] for split in SHARES}
    said: set[str] = set()
    for split in sorted(SHARES, key=SHARES.get):
        parts[split] = [clip for clip in parts[split] if clip.words not in said]
        said |= {clip.words for clip in parts[split]}
    return parts


def characters(parts: Mapping[str, Sequence[Clip]]) -> set[str]:
    """Those who can be asked for: heard often enough in training, and in test."""
    heard = Counter(clip.speaker for clip in parts["train"])
    return {clip.speaker for clip in parts["test"] if heard[clip.speaker] >= FEWEST}


def character(dialogue: str) -> str:
    """``SPARKY3`` is a dialogue with Sparky."""
    return dialogue.rstrip("0123456789").lower()


# the game's files


def read_package(archive: Path) -> tuple[dict[str, bytes], bytes]:
    """What the game's archive holds by name, and the package's copyright file."""
    found = dict(members(archive, "usr/share", (f"{QUEEN}/queen.1c", f"{QUEEN}/copyright")))
    data = found.get(f"scummvm/{QUEEN}/queen.1c", b"")
    copyright = found.get(f"doc/{QUEEN}/copyright")
    if data[:4] != b"QTBL" or copyright is None:
        raise PrepareError(f"{archive.name} holds no queen.1c and copyright of the game: get the original package")
    files = {}
    try:
        for at in range(15, 15 + 21 * struct.unpack_from(">H", data, 13)[0], 21):
            name, _, offset, size = struct.unpack_from(">12sBII", data, at)
            if offset + size > len(data):
                raise ValueError(f"{name!r} ends behind the file's end")
            files[name.rstrip(b"\0").decode("ascii")] = data[offset : offset + size]
    except (struct.error, ValueError) as error:
        raise PrepareError(f"{archive.name} holds a torn queen.1c ({error}): get the original package") from None
    return files, copyright


def clips_of(files: Mapping[str, bytes]) -> Iterator[Clip]:
    """Every line that has a clip, once."""
    named: dict[str, Clip] = {}
    for file in sorted(name for name in files if name.endswith(".DOG")):
        dialogue = file.removesuffix(".DOG")
        for name, text, other in lines_of(files[file]):
            if f"{name}.SB" in files and re.search(r"\w{2}", text):
                named.setdefault(name, Clip(name, text, character(dialogue) if other else HERO, dialogue))
    return iter(named.values())


def lines_of(content: bytes) -> Iterator[tuple[str, str, bool]]:
    """(clip's name, text, whether the other one says it) of every line of a dialogue.

    After 20 bytes: i16 levels, key, number, two more, u16 offsets at 22 of what the other says, at 24 of where that ends,
    at 26 of the two lines of a second meeting; what the hero says is at 32 + 96 |levels|. The line ``i`` is the clips
    ``{number:02}{i:04X}{J or P}{part:X}``, but the first that the hero says is SSSS, those of a second meeting XXXX.
    """
    data = content[HEAD:]
    levels, _, number = struct.unpack_from(">3h", data)
    others, end, again = struct.unpack_from(">3H", data, 22)
    spoken = [("SSSS" if i == 0 else f"{i:04X}", "J", text) for i, text in texts(data, 32 + 96 * abs(levels), others)]
    spoken += [(f"{i:04X}", "P", text) for i, text in texts(data, others, end)]
    for who in "PJ":
        text, again = short_text(data, again)
        spoken.append(("XXXX", who, text))
    for line, who, text in spoken:
        for part, said in enumerate(GESTURE.split(text), 1):
            yield f"{number:02d}{line}{who}{part:X}", said.strip(), who == "P"


def texts(data: bytes, at: int, end: int) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines from ``at`` to ``end``: 2 bytes, i16 number, u8 length, text, zeros to a multiple of 4."""
    while at + 5 <= end:
        (number,) = struct.unpack_from(">h", data, at + 2)
        text, at = short_text(data, at + 4)
        at += -at % 4
        yield number, text


def short_text(data: bytes, at: int) -> tuple[str, int]:
    """The text behind a byte with its length, and where it ends."""
    end = at + 1 + data[at]
    return data[at + 1 : end].decode("latin-1"), end
