"""Figures of a manual, thumbnails of games and spoken captions: what their packages say of a picture, split whole."""

import io
import json
import wave
from pathlib import Path

import pytest
import tiny_deb
import tiny_packages
from mitrain_demo import figures, packages, spoken
from test_packages import Client

from mitrain.core.errors import PrepareError
from mitrain.data.formats.captions import read_captions, read_karpathy
from mitrain.data.formats.labels import read_labels

SPLITS = ("train", "val", "test")
HELP = f"./{figures.HELP}/"


def figure(title: str, *images: str, below: tuple[str, ...] = ()) -> str:
    media = "".join(f'<img src="{image}" />' for image in images)
    texts = "".join(f'<div class="caption"><p>{text}</p></div>' for text in below)
    return f'<div class="figure"><p class="title"><strong>{title}</strong></p><div>{media}{texts}</div></div>'


def page(*found: str) -> bytes:
    head = '<?xml version="1.0" encoding="UTF-8"?><html xmlns="http://www.w3.org/1999/xhtml"><body>'
    return f"{head}{''.join(found)}</body></html>".encode()


def manual(folder: Path, more: dict[str, bytes] | None = None) -> list[Path]:
    pages = {
        "erode.html": page(
            figure(
                "Figure 1.1. The <span>“Erode”</span>\n dialog",
                "images/a1.png",
                below=("short words", "It makes four words more"),
            ),
            figure("Figure 1.2. Erode", "images/a2.png", "images/a3.png", below=("Original image", "Filter applied")),
            figure("Figure 1.3. Two without texts", "images/a4.png", "images/a5.png"),
            figure("Figure A.4. No such picture", "images/none.png"),
        ),
        "bad.html": page("<p>no figures</p>"),
    }
    pages |= {
        f"page{i}.html": page(figure(f"Figure 2.{i}. Figure {'abcdefghijkl'[i]}", f"images/p{i}.png")) for i in range(12)
    }
    pictures = {f"images/a{i}.png": tiny_packages.drawing(40 + i) for i in range(1, 6)}
    pictures |= {f"images/p{i}.png": tiny_packages.drawing(60 + i) for i in range(12)}
    files = {HELP + name: content for name, content in (pages | pictures | (more or {})).items()}
    licence = {"./usr/share/doc/gimp-help-common/copyright": b"License: GFDL-NIV-1.2+\n"}
    return [tiny_deb.deb(folder / "help.deb", files), tiny_deb.deb(folder / "common.deb", licence)]


def test_figures_and_their_captions(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    figures.build_help(manual(tmp_path), target, 0)
    rows = {s.id: s for split in SPLITS for s in read_captions(target / f"{split}.jsonl")}
    erode = {(s.inputs["image"], s.text) for name, s in rows.items() if name.startswith("erode#")}
    assert erode == {
        ("images/a1.png", "The “Erode” dialog"),
        ("images/a1.png", "It makes four words more"),
        ("images/a3.png", "Erode: Filter applied"),
    }
    assert len(rows) == 3 + 12 and (target / "images/a3.png").is_file() and not (target / "images/a4.png").exists()
    assert "GFDL" in (target / "COPYRIGHT").read_text()
    pages = [{s.object for s in read_karpathy(target, None, split)} for split in SPLITS]
    assert all(pages) and sum(map(len, pages)) == len(set().union(*pages)) == 13


def test_manuals_that_are_none(tmp_path):
    archives = manual(tmp_path)
    with pytest.raises(PrepareError, match="leave --archive out"):
        figures.build_help(archives[:1], tmp_path, 0)
    with pytest.raises(PrepareError, match=r"torn.html is no XHTML .*: get the original package"):
        figures.build_help(manual(tmp_path, {"torn.html": b"<html>"}), tmp_path, 0)
    with pytest.raises(PrepareError, match=r"images/p3.png is no readable picture"):
        figures.build_help(manual(tmp_path, {"images/p3.png": b"PNG"}), tmp_path, 0)
    with pytest.raises(PrepareError, match="gives 0 pictures with texts"):
        figures.build_help([archives[1], archives[1]], tmp_path, 0)


RECORD = """Package: {}
Version: 1-1
Description: {}
Description-md5: 0
Tag: {}, interface::graphical,
 role::program, {}
"""


def games(folder: Path) -> list[Path]:
    known = [(f"game{i}", f"game {'abcdefghijklmno'[i % 15]}{i}", "game::arcade", "game::TODO") for i in range(12)]
    known += [(f"rogue{i}", f"rogue {i}", "game::rpg:rogue", "game::board") for i in range(10)]
    known += [("odd", "odd one", "game::platform", "use::gameplaying"), ("no-genre", "none", "role::x", "game::TODO")]
    known += [("unseen", "without picture", "game::arcade", "game::board")]
    text = "\n".join(RECORD.format(*record) for record in known)
    pictures = {f"./{figures.THUMBNAILS}/{name}.png": tiny_packages.drawing(i) for i, (name, *_) in enumerate(known[:-1])}
    pictures[f"./{figures.THUMBNAILS}/unknown.png"] = tiny_packages.drawing(99)
    (folder / "records.txt").write_text(text)
    return [tiny_deb.deb(folder / "games.deb", pictures), folder / "records.txt"]


def test_games_have_the_genres_of_enough_games(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    figures.build_games(games(tmp_path), target, 0)
    rows = {s.id: s for split in SPLITS for s in read_labels(target / f"{split}.jsonl", multilabel=True)}
    assert rows.keys() == {f"game{i}" for i in range(12)} | {f"rogue{i}" for i in range(10)}
    assert rows["game3"].labels == ("arcade",) and rows["game3"].text == "game d3"
    assert rows["rogue4"].labels == ("board", "rogue")
    with pytest.raises(PrepareError, match="leave --archive out"):
        figures.build_games(games(tmp_path)[:1], target, 0)


def test_what_apt_knows_is_asked_once_and_kept(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    client = Client(tmp_path / "bin" / "apt-cache")
    client.plays("echo 'Package: a'; echo 'E: no b' >&2")
    monkeypatch.setenv("PATH", f"{client.path.parent}:/usr/bin:/bin")
    files = [packages.debian_records(["a", "b"], "records", tmp_path / "kept") for _ in range(2)]
    assert files[0] == files[1] and files[0].read_text() == "Package: a\n"
    assert client.calls() == ["show --no-all-versions a b"]
    client.plays("echo 'E: Unable to locate package b' >&2; exit 100")
    with pytest.raises(PrepareError, match="Unable to locate package b.*apt-get update"):
        packages.debian_records(["b"], "others", tmp_path / "kept")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match="no apt-cache"):
        packages.debian_records(["b"], "others", tmp_path / "kept")


def clip() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000)
        sound.writeframes(b"\0" * 800)
    return buffer.getvalue()


def test_spoken_captions_have_picture_speech_and_text(tmp_path):
    files = tiny_deb.stamps_files()
    for number, name in enumerate(sorted(files)):
        if name.endswith(".png"):
            files[name] = tiny_packages.drawing(number)
            files |= {
                name.removesuffix(".png") + end: clip() for end in ("_desc.ogg", "_desc_fr.ogg", "_desc_de.ogg", ".ogg")
            }
    target = tmp_path / "out"
    target.mkdir()
    spoken.build([tiny_deb.deb(tmp_path / "stamps.deb", files)], target, 0)
    rows = {}
    for split in SPLITS:
        for s in read_captions(target / f"{split}.jsonl", inputs=("image", "speech")):
            rows[s.id] = (split, s)
            assert all((target / path).is_file() for path in s.inputs.values())
    assert rows["animals/otter@fr"][1].text == "Un otter." and rows["animals/otter@en"][1].text == "An otter."
    assert rows["animals/otter@fr"][1].inputs["speech"] == "speech/animals/otter_desc_fr.ogg"
    assert rows["animals/otter@fr"][0] == rows["animals/otter@en"][0]
    assert not [name for name in rows if name.endswith("@de") or "symbols" in name or "mirror" in name]
    assert not list(target.rglob("*_de.ogg"))  # what no text belongs to is not kept
    objects = [{s.object for own, s in rows.values() if own == split} for split in SPLITS]
    assert all(objects) and sum(map(len, objects)) == len(set().union(*objects))
    lines = [json.loads(line) for line in (target / "test.jsonl").read_text().splitlines()]
    assert {line["language"] for line in lines} == {"en", "fr"}


def test_stamps_without_recordings_are_refused(tmp_path):
    with pytest.raises(PrepareError, match="holds no spoken captions"):
        spoken.build(tiny_packages.stamps(tmp_path), tmp_path, 0)
