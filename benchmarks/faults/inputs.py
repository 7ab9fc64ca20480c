"""What users and strangers hand in: configurations, pictures, rows, exports."""

import json
import struct
import zlib
from pathlib import Path

from benchmarks.faults.lab import Ended, Lab
from benchmarks.faults.suite import Found, fault, refused_at_start
from mitrain.methods.export_format.folder import checksum

AT_ONCE_S = 20.0
"""Beyond this a refusal that needs no work is late, on however busy a machine."""


def at_once(ended: Ended, *needles: str) -> Found:
    found = refused_at_start(ended, *needles)
    if found.end_state == "refused" and ended.seconds > AT_ONCE_S:
        found.end_state = "late"
    return found


def config_of(lab: Lab, case: Path, text: str) -> Found:
    file = case / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return at_once(lab.run("train", file, "--run-dir", case / "run"), str(file))


@fault("refused", quick=True)
def aliases_without_end(lab: Lab, case: Path) -> Found:
    """Nine levels of nine aliases: 10⁹ nodes from 300 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return config_of(lab, case, "\n".join(lines))


@fault("refused")
def anchor_within_itself(lab: Lab, case: Path) -> Found:
    return config_of(lab, case, "model: &m {llm: *m}\n")


@fault("refused")
def keys_that_are_no_text(lab: Lab, case: Path) -> Found:
    return config_of(lab, case, "2020-01-01: 1\n!!binary aGVsbG8=: 2\n")


@fault("refused")
def config_without_end(lab: Lab, case: Path) -> Found:
    return at_once(lab.run("train", "/dev/zero", "--run-dir", case / "run"), "/dev/zero")


@fault("counted")
def picture_of_40000_by_1(lab: Lab, case: Path) -> Found:
    """85 bytes that a square canvas would make 6 GiB of: a bad sample that is named, or a picture scaled first."""
    here = lab.other_world(case)
    (here / "data" / "images" / "3.png").write_bytes(png(40_000, 1))
    arguments = ("train", here / "config.yaml", "--run-dir", case / "run", "model.encoders=" + padded(here))
    ended = lab.run(*arguments)
    state = "counted" if ended.code == 0 and ended.seconds < AT_ONCE_S * 3 else ended.state
    return Found(True, state, ended.seconds, said=" / ".join(ended.lines[:1]))


def padded(here: Path) -> str:
    return json.dumps({"image": {"name": str(here / "vision"), "layer": 2, "resize": "pad"}})


def png(width: int, height: int) -> bytes:
    """An all-black greyscale PNG."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * (width + 1) * height, 9)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@fault("can be wrong", quick=True)
def answers_without_candidates(lab: Lab, case: Path) -> Found:
    """The score of a model that has learnt nothing is not 1, and a control can lower what is learnt."""
    here = lab.other_world(case)
    for name in ("train", "val", "test"):
        file = here / "data" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            del row["candidates"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = case / "run"
    trained = lab.run("train", here / "config.yaml", "--run-dir", run)
    if trained.code:
        return Found(True, trained.state, trained.seconds, said=" / ".join(trained.lines[:1]))
    ended = lab.run("eval", run, "--control", "frozen", "--json")
    score = json.loads(ended.out)["accuracy"] if ended.code == 0 else None
    state = "can be wrong" if score is not None and score < 1 else f"accuracy {score}"
    return Found(True, state, trained.seconds, said=f"accuracy without infusion: {score}")


@fault("escaped")
def control_characters_in_a_path(lab: Lab, case: Path) -> Found:
    here = lab.other_world(case)
    file = here / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[0]["image"] = "images/\x1b]0;title\x07.png"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ended = lab.run("train", here / "config.yaml", "train.steps=2", "--run-dir", case / "run")
    raw = any(c in ended.err + ended.out for c in "\x1b\x07")
    return Found(True, "raw" if raw else "escaped", ended.seconds, said=" / ".join(ended.lines[:1]))


def exported(lab: Lab, case: Path) -> Path:
    run, folder = case / "run", case / "adapter"
    for arguments in (
        ("train", lab.world / "config.yaml", "train.steps=2", "--run-dir", run),
        ("export", run, "--out", folder),
    ):
        ended = lab.run(*arguments)
        if ended.code:
            raise RuntimeError(ended.err[-500:])
    return folder


def hostile(lab: Lab, case: Path, change) -> Found:
    """An export whose mitrain.json a stranger has edited: refused before anything is made of it."""
    folder = exported(lab, case)
    file = folder / "mitrain.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    values["checksum"] = checksum(values)  # a stranger can compute it, too
    file.write_text(json.dumps(values), encoding="utf-8")
    picture = lab.world / "data" / "images" / "0.png"
    return at_once(lab.run("predict", folder, "--image", picture, "--text", "this is"))


@fault("refused", quick=True)
def template_of_a_gigabyte(lab: Lab, case: Path) -> Found:
    return hostile(lab, case, lambda v: v["run"]["config"]["task"].update(template="{prompt:>1000000000}"))


@fault("refused")
def template_that_reads_attributes(lab: Lab, case: Path) -> Found:
    return hostile(lab, case, lambda v: v["run"]["config"]["task"].update(template="{prompt.__class__}"))


@fault("refused")
def deviation_of_zero(lab: Lab, case: Path) -> Found:
    return hostile(lab, case, lambda v: v["run"]["encoders"][0]["preprocess"].update(std=[0, 0, 0]))


@fault("refused")
def weights_of_20_gigabytes(lab: Lab, case: Path) -> Found:
    """A sparse file behind the right header."""
    folder = exported(lab, case)
    file = next(folder.glob("*.safetensors"))
    with open(file, "r+b") as opened:
        opened.truncate(20 << 30)
    picture = lab.world / "data" / "images" / "0.png"
    return at_once(lab.run("predict", folder, "--image", picture, "--text", "this is"))


@fault("refused")
def settings_through_a_run_folder(lab: Lab, case: Path) -> Found:
    """The same bounded reader stands before a run's config.yaml."""
    run = case / "run"
    run.mkdir()
    (run / "config.yaml").write_text("a: &a [*a]\n", encoding="utf-8")
    return at_once(lab.run("train", "--resume", run), "config.yaml")
