"""Prepared speech and rated sentences: readers of the packages' own formats, labels, and what no two splits may share."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import tiny_deb
import tiny_speech
from mitrain_demo import dialogue, lines, sentiment, voices
from mitrain_demo.dialogue import Clip

from mitrain.core.errors import PrepareError
from mitrain.data.formats.captions import read_captions
from mitrain.data.formats.labels import read_labels
from mitrain.data.formats.targets import read_targets

SPLITS = ("train", "val", "test")
PACKAGES = {
    "dialogue": (dialogue, tiny_speech.queen),
    "voices": (voices, tiny_speech.voices),
    "sentiment": (sentiment, tiny_speech.ratings),
}


def rows(folder: Path, prefix: str = "") -> dict[str, list[dict]]:
    return {s: [json.loads(line) for line in (folder / f"{prefix}{s}.jsonl").read_text().splitlines()] for s in SPLITS}


def shared(splits: dict[str, list], *fields: str) -> list[str]:
    """What two splits have in common."""
    return [
        f"{a} and {b}: {field} {value!r}"
        for a, b in combinations(splits, 2)
        for field in fields
        for value in sorted({row[field] for row in splits[a]} & {row[field] for row in splits[b]})
    ]


# dialogue


@pytest.fixture(scope="module")
def talk(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("dialogue")
    dialogue.build([tiny_speech.queen(tmp_path_factory.mktemp("package"))], target, 0)
    return target


def test_lines_of_a_dialogue_are_read_with_who_says_them_and_the_clips_they_are():
    hero = [(0, "Hi.*03"), (6, "*FRWhere to?*XY0123456789A Home.*02")]
    content = tiny_speech.dog(7, hero, [(300, "Who's there...")], ("Oh?", "0"))
    assert [line for line in dialogue.lines_of(content) if line[1]] == [
        ("07SSSSJ1", "Hi.", False),
        ("070006J2", "Where to?", False),
        ("070006J3", "Home.", False),
        ("07012CP1", "Who's there...", True),
        ("07XXXXP1", "Oh?", True),
        ("07XXXXJ1", "0", False),
    ]


@pytest.mark.parametrize(
    ("text", "words", "mode"),
    [
        ("Hi, it's ME -- Mr O'Neil!", "hi it's me mr o'neil", "exclamation"),
        ("'Ello 'ello...", "ello ello", "unfinished"),
        ('He said "Why?"', "he said why", "question"),
        ("well_known.", "well known", "statement"),
        ("What?!", "what", "exclamation"),
        ("Trailing..", "trailing", "statement"),
        ("Hmm", "hmm", None),
    ],
)
def test_words_have_no_punctuation_and_the_mode_is_what_ended_the_line(text: str, words: str, mode: str | None):
    clip = Clip("010006P1", text, "sam", "SAM1")
    assert (clip.words, clip.mode) == (words, mode)


def test_clips_are_cut_as_they_are_and_told_by_what_the_script_says(talk: Path):
    spoken = {row["id"]: row for part in rows(talk).values() for row in part}
    assert spoken["010005P2"] == {
        "id": "010005P2",
        "speech": "clips/010005P2.mp3",
        "text": "sam line 1 0.",
        "label": "sam",
        "object": "SAM1",
    }
    assert spoken["010005J3"]["label"] == "joe" and spoken["010005J3"]["text"] == "Yes, joe's 1-0!"
    assert (talk / spoken["010005P2"]["speech"]).read_bytes() == b"010005P2"
    assert not {"010006P2", "01005BP1"} & set(spoken)  # one has no clip, one is a letter
    assert {path.stem for path in (talk / "clips").iterdir()} == set(spoken)
    modes = {row["id"]: row for part in rows(talk, "mode-").values() for row in part}
    assert (modes["010005P3"]["text"], modes["010005P3"]["label"]) == ("yes sam's 1 0", "exclamation")
    assert Counter(row["label"] for row in modes.values())["unfinished"] > 0


def test_dialogues_are_held_out_whole_and_no_words_are_in_two_splits(talk: Path):
    spoken = rows(talk)
    assert all(spoken.values()) and shared(spoken, "id", "object") == []
    words = {s: [{"words": Clip("", r["text"], "", "").words} for r in part] for s, part in spoken.items()}
    assert shared(words, "words") == []
    where = [split for split in SPLITS if any(row["text"] == "Good day!" for row in spoken[split])]
    assert where == ["val"]  # the smallest split keeps what all dialogues say
    assert shared(rows(talk, "mode-"), "text", "object") == []


def test_characters_that_are_asked_for_were_heard_and_are_in_test(talk: Path):
    asked = rows(talk, "character-")
    labels = {split: {row["label"] for row in part} for split, part in asked.items()}
    assert labels["train"] == {"joe", "sam", "tom"} >= labels["test"] >= {"sam", "tom"}  # uma has one dialogue
    assert {row["text"] for part in asked.values() for row in part} == {""}


def test_mitrain_reads_its_tables(talk: Path):
    for split in SPLITS:
        assert read_labels(talk / f"mode-{split}.jsonl", inputs=("speech",))
        assert read_labels(talk / f"character-{split}.jsonl", inputs=("speech",))
        assert read_captions(talk / f"{split}.jsonl", inputs=("speech",))


def test_a_game_that_is_torn_or_another_is_refused_in_a_line(tmp_path: Path):
    files = tiny_speech.queen_files()
    torn = files | {"SAM1.DOG": files["SAM1.DOG"][:60]}
    cases = {"torn dialogue": torn, "holds 0 spoken lines": {}}
    for number, (reason, content) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        (folder / "out").mkdir(parents=True)
        with pytest.raises(PrepareError, match=reason) as caught:
            dialogue.build([tiny_speech.queen(folder, content)], folder / "out", 0)
        assert "\n" not in str(caught.value)
    data = tiny_speech.qtbl(files)
    for number, content in enumerate((data[:40], data[:-9], b"QTBX" + data[4:])):
        inside = {
            f"./usr/share/scummvm/{tiny_speech.QUEEN}/queen.1c": content,
            f"./usr/share/doc/{tiny_speech.QUEEN}/copyright": b"x",
        }
        with pytest.raises(PrepareError, match=r"torn queen\.1c|holds no queen\.1c"):
            dialogue.build([tiny_deb.deb(tmp_path / f"{number}.deb", inside)], tmp_path, 0)


# voices


def test_voices_are_held_out_whole_with_groups_derived_from_events(tmp_path: Path):
    (tmp_path / "out").mkdir()
    voices.build([tiny_speech.voices(tmp_path)], tmp_path / "out", 0)
    heard = rows(tmp_path / "out")
    assert all(heard.values()) and shared(heard, "id", "speech", "object") == []
    every = [row for part in heard.values() for row in part]
    assert Counter(row["kind"] for row in every) == dict.fromkeys(("Stupid", "Incoming", "Laugh", "Hello", "Ow1"), 7) | {
        "Ow2": 1  # which all voices share
    }
    assert {(row["kind"], row["label"]) for row in every} == {
        *(
            ("Stupid", "anger"),
            ("Incoming", "fear"),
            ("Laugh", "joy"),
            ("Hello", "neutral"),
            ("Ow1", "pain"),
            ("Ow2", "pain"),
        )
    }
    for row in every:
        if row["kind"] != "Ow2":
            assert (tmp_path / "out" / row["speech"]).read_bytes() == f"{row['object']} {row['kind']}".encode()
    assert len(read_labels(tmp_path / "out" / "train.jsonl", inputs=("speech",))) == len(heard["train"])
    assert "DERIVED" in (tmp_path / "out" / "README.txt").read_text()


def test_a_package_without_voices_is_refused(tmp_path: Path):
    with pytest.raises(PrepareError, match="holds 2 of the game's voices"):
        voices.build([tiny_speech.voices(tmp_path, ("Ann", "Bob"))], tmp_path, 0)


@pytest.mark.parametrize("name", ["dialogue", "voices", "sentiment"])
def test_the_same_seed_gives_the_same_files_and_another_seed_other_splits(tmp_path: Path, name: str):
    module, package = PACKAGES[name]
    made = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 5)):
        (tmp_path / folder).mkdir()
        module.build([package(tmp_path)], tmp_path / folder, seed)
        files = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        made.append({str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in files})
    assert made[0] == made[1] and made[0]["test.jsonl"] != made[2]["test.jsonl"]


# lines in several languages


def test_fillets_have_the_line_that_is_said_its_english_and_who_says_it(tmp_path: Path):
    (tmp_path / "out").mkdir()
    lines.build_fillets(tiny_speech.fillets(tmp_path), tmp_path / "out", 0)
    spoken = rows(tmp_path / "out")
    every = {row["id"]: row for part in spoken.values() for row in part}
    assert every["cs/level3/v-3"] == {
        "id": "cs/level3/v-3",
        "speech": "clips/cs/level3/v-3.ogg",
        "text": '"Řádek" cs 3.',
        "label": "big",
        "english": "Line 3",
        "language": "cs",
        "object": "level3",
    }
    assert (tmp_path / "out" / every["nl/level2/v-2"]["speech"]).read_bytes() == b"nl 2 v-2"
    assert Counter(row["label"] for row in every.values())["statue"] == 6
    assert {path.stem for path in (tmp_path / "out").rglob("*.ogg")} == {Path(name).stem for name in every}
    assert all(spoken.values()) and shared(spoken, "id", "object", "text") == []  # "Ano!" is said in every level
    fish = rows(tmp_path / "out", "fish-")
    assert {(row["label"], row["text"]) for part in fish.values() for row in part} == {("small", ""), ("big", "")}
    assert "GPL-2 fillets-ng-data-nl" in (tmp_path / "out" / "COPYRIGHT").read_text()
    assert read_captions(tmp_path / "out" / "train.jsonl", inputs=("speech",))
    assert read_labels(tmp_path / "out" / "fish-train.jsonl", inputs=("speech",))


def test_a_prompt_is_in_one_split_in_all_languages(tmp_path: Path):
    (tmp_path / "out").mkdir()
    lines.build_prompts(tiny_speech.prompts(tmp_path), tmp_path / "out", 0)
    spoken = rows(tmp_path / "out")
    every = {row["id"]: row for part in spoken.values() for row in part}
    assert every["it/digits/5"] == {
        "id": "it/digits/5",
        "speech": "clips/it/digits/5.wav",
        "text": "Riga 5: ok.",
        "label": "it",
        "language": "it",
        "object": "line 5 ok",
    }
    assert (tmp_path / "out" / "clips/en/digits/3.wav").read_bytes() == b"en digits/3"
    assert len(every) == 18 and not {"en/beep", "en/unsaid"} & set(every)
    assert every["en/again"]["object"] == every["it/digits/0"]["object"] == "line 0 ok"
    assert all(spoken.values()) and shared(spoken, "id", "object") == []
    assert read_captions(tmp_path / "out" / "train.jsonl", inputs=("speech",))


def test_packages_without_lines_or_with_a_torn_list_are_refused_in_a_line(tmp_path: Path):
    with pytest.raises(PrepareError, match="hold 0 spoken lines: get the original ones, all of them"):
        lines.build_fillets(tiny_speech.fillets(tmp_path)[:1], tmp_path, 0)
    torn = {"./usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz": b"none"}
    with pytest.raises(PrepareError, match=r"core-sounds-en\.txt\.gz is no list of prompts") as caught:
        lines.build_prompts([tiny_deb.deb(tmp_path / "torn.deb", torn)], tmp_path, 0)
    assert "\n" not in str(caught.value)


# sentiment


def test_rated_sentences_keep_their_ratings_and_no_words_are_in_two_splits(tmp_path: Path):
    (tmp_path / "out").mkdir()
    sentiment.build([tiny_speech.ratings(tmp_path)], tmp_path / "out", 0)
    films = {split: read_targets(tmp_path / "out" / f"{split}.jsonl", inputs=()) for split in SPLITS}
    every = {sample.id: sample for part in films.values() for sample in part}
    assert len(every) == 30 and all(films.values())
    assert (every["movie/3"].text, every["movie/3"].target) == ("A film of d0, café.", -1.2)
    where = [split for split, part in films.items() if {"movie/1", "movie/29"} & {sample.id for sample in part}]
    assert len(where) == 1  # the same words in other letters
    products = read_targets(tmp_path / "out" / "test_amazon.jsonl", inputs=())
    assert [(s.id, s.target) for s in products] == [("amazon/1_1", -0.5), ("amazon/1_2", 2.25), ("amazon/2_2", 1.0)]


@pytest.mark.parametrize("films", ["1\tgood\tA film.\r\n", "1 2 3\r\n"])
def test_a_source_package_of_something_else_is_refused_in_a_line(tmp_path: Path, films: str):
    path = tiny_speech.ratings(tmp_path, films)
    with pytest.raises(PrepareError, match="is not vaderSentiment's source package") as caught:
        sentiment.build([path], tmp_path, 0)
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PrepareError, match="is not vaderSentiment's source package"):
        sentiment.build([path], tmp_path, 0)
