"""The data sets ``fillets`` and ``prompts``: spoken lines in several languages with their exact text, as packages have them.

``fillets``: the puzzle game Fish Fillets NG in Czech and Dutch, by level. ``script/LEVEL/dialogs_LANGUAGE.lua`` holds
``dialogId("ID", "font_CHARACTER", "English")`` and ``dialogStr("what is said")``, ``sound/LEVEL/LANGUAGE/ID.ogg`` the clip.
``prompts``: the telephone system Asterisk's in five languages, one voice each. ``core-sounds-LANGUAGE.txt.gz`` holds lines
``KEY: what is said``, ``sounds/VOICE/KEY.wav`` the clip.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic, write_json
from mitrain_demo.deb import members
from mitrain_demo.dialogue import counted, plain_words
from mitrain_demo.pairs import write_splits
from mitrain_demo.splits import SHARES, split_groups

GAME = "games/fillets-ng/"
DIALOG = re.compile(r'dialogId\("(.+?)",\s*"(.*?)",\s*"((?:[^"\\]|\\.)*)"\)\s*dialogStr\("((?:[^"\\]|\\.)*)"\)')
FISH = ("small", "big")

FILLETS = """Spoken lines of the game Fish Fillets NG, made by mitrain from the Debian packages fillets-ng-data, -cs and -nl.

ACTED DIALOGUE OF A FREE GAME, in Czech and Dutch; the voices are those of a cartoon. Text and clips: the authors of Fish
Fillets NG, GPL-2 (see COPYRIGHT); clips as the packages have them (Ogg Vorbis). Whole levels are held out, and no line (but
for case and punctuation) is in two splits.

{split}.jsonl: a clip a line: id, speech, text (what is said), english (the line in English), label (who speaks, by the
game's lettering: small and big are the two fish), language, object (the level).
fish-{split}.jsonl: no text; the lines of the two fish.
summary.json: counts, and the share of the commonest label.
"""
PROMPTS = """Telephone prompts, made by mitrain from the Debian packages asterisk-core-sounds-LANGUAGE and -LANGUAGE-wav.

ONE VOICE A LANGUAGE: who speaks and which language it is cannot be told apart. Recordings, texts: the Asterisk project and
those who spoke them, CC-BY-SA-3.0, in Italian and Russian CC-BY-3.0 (see COPYRIGHT); clips as the packages have them (WAV at
8 kHz). A prompt is in one split in all languages, and no line (but for case and punctuation) is in two splits.

{split}.jsonl: a clip a line: id, speech, text (what is said), label and language (the language), object (the prompt).
summary.json: counts, and the share of the commonest label.
"""


@dataclass(frozen=True)
class Line:
    """A spoken line: ``clip`` is its file's content, ``group`` what no two splits share, ``facts`` more of its record."""

    id: str
    clip: bytes
    text: str
    label: str
    group: str
    facts: Mapping[str, str]


def build_fillets(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian packages fillets-ng-data, -cs and -nl. Raises PrepareError."""
    files, copyright = read_packages(archives, (".ogg", ".lua"))
    parts = write_lines(list(fillets_of(files)), target, ".ogg", FILLETS, copyright, seed)
    fish = {s: [row | {"text": ""} for row in part if row["label"] in FISH] for s, part in parts.items()}
    write_splits(target, {f"fish-{split}": part for split, part in fish.items()})


def build_prompts(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from Debian's asterisk-core-sounds packages. Raises PrepareError."""
    files, copyright = read_packages(archives, (".wav", ".txt.gz"))
    write_lines(list(prompts_of(files)), target, ".wav", PROMPTS, copyright, seed)


def read_packages(archives: Sequence[Path], suffixes: tuple[str, ...]) -> tuple[dict[str, bytes], bytes]:
    """The files of several packages below usr/share by path, and their copyright files, one after another."""
    files = {path: data for one in archives for path, data in members(one, "usr/share", (*suffixes, "/copyright"))}
    notices = [f"{path}\n\n".encode() + data for path, data in sorted(files.items()) if path.endswith("/copyright")]
    return files, b"\n\n".join(notices)


def fillets_of(files: Mapping[str, bytes]) -> Iterator[Line]:
    """Every line that has a clip and a text of its own language."""
    for path, content in sorted(files.items()):
        script = re.fullmatch(rf"{GAME}script/(\w+)/dialogs_(cs|nl)\.lua", path)
        for name, font, english, said in DIALOG.findall(content.decode("utf-8", "replace")) if script else ():
            level, language = script.groups()
            clip, text = files.get(f"{GAME}sound/{level}/{language}/{name}.ogg"), unescaped(said)
            if clip and plain_words(text):
                facts = {"english": unescaped(english), "language": language}
                yield Line(f"{language}/{level}/{name}", clip, text, font.removeprefix("font_"), level, facts)


def prompts_of(files: Mapping[str, bytes]) -> Iterator[Line]:
    """Every prompt that has a text; what is in brackets says of a sound what it is."""
    said = {(language, key): text for language, key, text in texts_of(files)}
    for path, clip in sorted(files.items()):
        spoken = re.fullmatch(r"asterisk/sounds/([a-z]+)_\w+?/(.+)\.wav", path)
        language, key = spoken.groups() if spoken else ("", "")
        text = said.get((language, key), "")
        if plain_words(text) and not text.startswith("["):
            group = plain_words(said.get(("en", key), key)) or key
            yield Line(f"{language}/{key}", clip, text, language, group, {"language": language})


def texts_of(files: Mapping[str, bytes]) -> Iterator[tuple[str, str, str]]:
    """(language, key, text) of every line of the packages' lists. Raises PrepareError."""
    for path, content in files.items():
        named = re.search(r"/core-sounds-([a-z]+)\.txt\.gz$", path)
        try:
            lines = gzip.decompress(content).decode("utf-8-sig").splitlines() if named else []
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise PrepareError(f"{path} is no list of prompts ({error}): get the original packages") from None
        for line in lines:
            key, mark, text = line.partition(":")
            if mark and not line.startswith(";"):
                yield named[1], key.strip(), text.strip()


def unescaped(text: str) -> str:
    """A Lua string's text."""
    return re.sub(r"\\(.)", r"\1", text)


def write_lines(
    lines: Sequence[Line], target: Path, suffix: str, readme: str, copyright: bytes, seed: int
) -> dict[str, list[dict[str, str]]]:
    """Write clips, tables and notices of ``lines``, whole groups held out; a line that is said in several splits stays in
    the smallest of them alone. Returns each split's records."""
    if len({line.group for line in lines}) < len(SHARES):
        raise PrepareError(f"the packages hold {len(lines)} spoken lines: get the original ones, all of them")
    splits = split_groups([line.group for line in lines], f"{suffix} {seed}")
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SHARES}
    kept: set[str] = set()
    for split in sorted(SHARES, key=SHARES.get):
        own = [one for one, of in zip(lines, splits, strict=True) if of == split and plain_words(one.text) not in kept]
        kept |= {plain_words(line.text) for line in own}
        for line in own:
            file = target / "clips" / f"{line.id}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, line.clip)
            named = {"id": line.id, "speech": f"clips/{line.id}{suffix}", "text": line.text, "label": line.label}
            rows[split].append({**named, **line.facts, "object": line.group})
    write_atomic(target / "README.txt", readme)
    write_atomic(target / "COPYRIGHT", copyright)
    write_splits(target, rows)
    write_json(target / "summary.json", {split: counted(part) for split, part in rows.items()})
    return rows
