"""Packages of a few kilobytes laid out like the speech ones: the game's dialogues, the voices, the rated sentences."""

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import tiny_deb

QUEEN = "flight-of-the-amazon-queen"
Line = tuple[int, str]


def said(number: int, text: str) -> bytes:
    made = struct.pack(">hhB", 0, number, len(text)) + text.encode("latin-1")
    return made + bytes(-len(made) % 4)


def dog(number: int, hero: Sequence[Line], other: Sequence[Line], again: tuple[str, str] = ("0", "0")) -> bytes:
    """A dialogue of one level: what the hero says, what the other says, and the two lines of a second meeting."""
    first, second = (b"".join(said(*line) for line in lines) for lines in (hero, other))
    begins = 32 + 96
    ends = begins + len(first) + len(second)
    head = struct.pack(">5h", -1, number, number, 9, 9) + bytes(12)
    head += struct.pack(">3H", begins + len(first), ends, ends + 8) + bytes(4)
    meeting = b"".join(bytes([len(text)]) + text.encode("latin-1") for text in again)
    return b"AmBk" + bytes(16) + head + bytes(96) + first + second + bytes(8) + meeting + bytes(20)


def qtbl(files: dict[str, bytes]) -> bytes:
    at, table, data = 15 + 21 * len(files), [], []
    for name, content in files.items():
        table.append(struct.pack(">12sBII", name.encode(), 1, at, len(content)))
        data.append(content)
        at += len(content)
    return b"QTBL" + bytes(9) + struct.pack(">H", len(files)) + b"".join(table + data)


def lines(who: str, number: int, count: int) -> list[Line]:
    ends = (".", "?", "!", "...")
    return [(5 + i, f"*FR{who} line {number} {i}{ends[i % 4]}*03 Yes, {who}'s {number}-{i}!*15") for i in range(count)]


def queen_files() -> dict[str, bytes]:
    """Dialogues with three people, each line two clips; one says what others say, too."""
    files: dict[str, bytes] = {}
    number = 0
    for name, meetings in (("SAM", 3), ("TOM", 2), ("UMA", 1)):
        for meeting in range(1, meetings + 1):
            number += 1
            hero, other = lines("joe", number, 4), lines(name.lower(), number, 12)
            hero = [(0, f"Hi {name}{number}.*03"), *hero]
            other = [*other, (90, "Good day!"), (91, "H")]
            files[f"{name}{meeting}.DOG"] = dog(number, hero, other, ("You again?", f"Bye {number}."))
            clips = [f"{number:02d}SSSSJ1", f"{number:02d}XXXXP1", f"{number:02d}XXXXJ1", f"{number:02d}005AP1"]
            clips += [f"{number:02d}005BP1"]
            clips += [
                f"{number:02d}{i:04X}{who}{k}" for who, n in (("J", 4), ("P", 12)) for i in range(5, 5 + n) for k in (2, 3)
            ]
            files |= {f"{clip}.SB": clip.encode() for clip in clips if clip != "010006P2"}  # which has no clip
    return files


def queen(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    share = "./usr/share/"
    inside = {f"{share}doc/{QUEEN}/copyright": b"give it away\n"}
    inside[f"{share}scummvm/{QUEEN}/queen.1c"] = qtbl(queen_files() if files is None else files)
    return tiny_deb.deb(folder / "queen.deb", inside)


def voices(folder: Path, names: Sequence[str] = ("Ann", "Bob", "Cyd", "Dee", "Eve", "Flo", "Gus")) -> Path:
    """Voices with an event of each group, one that is in none, and a clip that they share."""
    events = ("Stupid", "Incoming", "Laugh", "Hello", "Ow1", "Kamikaze")
    inside = {"./usr/share/doc/hedgewars-data/copyright": b"GFDL-1.3\n"}
    for name in names:
        at = f"./usr/share/games/hedgewars/Data/Sounds/voices/{name}/"
        inside |= {f"{at}{event}.ogg": f"{name} {event}".encode() for event in events} | {f"{at}Ow2.ogg": b"the same"}
    inside["./usr/share/games/hedgewars/Data/Sounds/Laugh.ogg"] = b"no voice"
    return tiny_deb.deb(folder / "voices.deb", inside)


def fillets(folder: Path, levels: int = 6) -> list[Path]:
    """The game's three packages: levels of three lines in Czech and two in Dutch, one of which all levels say."""
    game, texts, clips = "./usr/share/games/fillets-ng/", {}, {"cs": {}, "nl": {}}
    for n in range(levels):
        for language in clips:
            said = [("m-ano", "small", "Yes.", "Ano!"), (f"v-{n}", "big", f"Line {n}", rf"\"Řádek\" {language} {n}.")]
            said += [("x-end", "", "", "")] + [("s-1", "statue", "Citizens!", f"Občané {n}!")] * (language == "cs")
            dialogs = [f'dialogId("{i}", "font_{who}", "{en}")\ndialogStr("{text}")\n\n' for i, who, en, text in said]
            texts[f"{game}script/level{n}/dialogs_{language}.lua"] = "\n".join(dialogs).encode()
            names = [name for name, *_ in said] + ["r-unsaid"]
            clips[language] |= {f"{game}sound/level{n}/{language}/{i}.ogg": f"{language} {n} {i}".encode() for i in names}
    packages = {"fillets-ng-data": texts, **{f"fillets-ng-data-{language}": part for language, part in clips.items()}}
    return [
        tiny_deb.deb(folder / f"{name}.deb", {f"./usr/share/doc/{name}/copyright": f"GPL-2 {name}".encode(), **files})
        for name, files in packages.items()
    ]


def prompts(folder: Path, count: int = 8) -> list[Path]:
    """English and Italian lists, and clips in the languages' own folders; one line is said by two keys."""
    found = []
    for language, voice, word in (("en", "en_US_f_Ann", "Line"), ("it", "it_IT_m_Bo", "Riga")):
        keys = [f"digits/{i}" for i in range(count)]
        said = [f"{key}: {word} {i}: ok." for i, key in enumerate(keys)] + [f"again: {word} 0, ok!", "beep: [a beep]"]
        text = "\ufeff; Core Sounds\n\n" + "\n".join([*said, "unsaid: No clip.", "no mark"])
        name = f"asterisk-core-sounds-{language}"
        inside = {f"./usr/share/doc/{name}/core-sounds-{language}.txt.gz": gzip.compress(text.encode(), mtime=0)}
        found.append(tiny_deb.deb(folder / f"{name}.deb", inside))
        clips = {f"./usr/share/asterisk/sounds/{voice}/{key}.wav": f"{language} {key}" for key in (*keys, "again", "beep")}
        clips |= {f"./usr/share/doc/{name}-wav/copyright": f"CC {language}"}
        found.append(tiny_deb.deb(folder / f"{name}-wav.deb", {path: data.encode() for path, data in clips.items()}))
    return found


def ratings(folder: Path, films: str | None = None) -> Path:
    """vaderSentiment's source package: 30 sentences on films, two of them alike, and 4 on products."""
    said = [f"{i}\t{i / 10 - 1.5}\tA film of {chr(97 + i % 26)}{i // 26}, caf\u00e9.\r\n" for i in range(29)]
    movie = "".join([*said, "29\t-4\tA  FILM of b0, caf\u00e9.\r\n"]) if films is None else films
    amazon = "1_1\t-0.5\tno picture.\r\n1_2\t2.25\tworks\r\n2_1\t0\ta film of c0, caf\u00e9.\r\n2_2\t1\tfine\r\n"
    names = {"movie": movie, "amazon": amazon, "tweets": "1\t1\tx\r\n"}
    inner = {f"hutto_ICWSM_2014/{n}ReviewSnippets_GroundTruth.txt": text.encode() for n, text in names.items()}
    base = "vaderSentiment-2.5/"
    path = folder / "vaderSentiment-2.5.tar.gz"
    outer = {
        f"{base}additional_resources/hutto_ICWSM_2014.tar.gz": gzip.compress(tiny_deb.tar(inner)),
        f"{base}LICENSE.txt": b"MIT\n",
    }
    path.write_bytes(gzip.compress(tiny_deb.tar(outer)))
    return path
