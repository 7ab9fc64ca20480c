"""WebDataset's tar archives: members by key and extension, and archives that somebody hostile wrote."""

import io
import json
import tarfile

import numpy as np
import pytest
from embedded import png, refused, shard

from mitrain.data.arrays import read_array
from mitrain.data.formats.labels import read_labels
from mitrain.data.formats.manifest import Manifest
from mitrain.data.formats.records import read_records
from mitrain.data.images import read_image
from mitrain.data.texts import read_text

LABELS = {"image": "jpg;png", "text": "txt", "label": "cls"}


def array(values: np.ndarray, **named: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **named) if named else np.save(buffer, values)
    return buffer.getvalue()


def sample(key: str, colour: str = "red", label: str = "0") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(colour)), (f"{key}.txt", b"some words"), (f"{key}.cls", label.encode())]


def test_extensions_and_keys_of_json_are_columns(tmp_path):
    facts = {"caption": "a red thing", "kind": "photo", "n": 3}
    shard(tmp_path / "0.tar", [*sample("a/x"), ("a/x.json", json.dumps(facts).encode()), ("a/x.pyd", b"\0")])
    for found in (
        read_labels(tmp_path / "0.tar", LABELS),
        read_labels(tmp_path / "0.tar", LABELS | {"text": "caption", "label": "n"}),
    ):
        (one,) = found
        assert one.id == "0.tar:a/x" and one.kind == "photo"
        assert read_image(tmp_path, one.inputs["image"]).stored_size == (6, 4)
    assert one.text == "a red thing" and one.labels == ("3",)


def test_members_are_read_by_their_place(tmp_path):
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    members = []
    for n, row in enumerate(vectors):
        members += [(f"k{n}.npy", array(row)), (f"k{n}.npz", array(row, own=row))]
        members += [(f"k{n}.note.txt", b"words"), (f"k{n}.cls", b"x")]
    (tmp_path / "in").mkdir()
    shard(tmp_path / "in" / "0.tar", members)
    columns = {"mine": "npy", "other": "npz", "note": "note.txt", "label": "cls"}
    samples = read_labels(Manifest(tmp_path, "in/0.tar"), columns, inputs=("mine", "other", "note"))
    for name in ("mine", "other"):
        np.testing.assert_array_equal([read_array(tmp_path, s.inputs[name]).values for s in samples], vectors)
    assert read_text(tmp_path, samples[2].inputs["note"]).text == "words"
    assert samples[0].inputs["mine"].startswith("in/0.tar#") and samples[0].inputs["mine"].endswith("/k0.npy")


def test_shards_of_a_pattern_are_one_split_and_inputs_may_lack(tmp_path):
    shard(tmp_path / "00.tar", [*sample("a", "red", "x"), *sample("b", "blue", "y")[1:]])
    shard(tmp_path / "01.tar", sample("c", "white", "x"))
    found = read_labels(Manifest(tmp_path, "{00..01}.tar"), LABELS, may_lack=("image",))
    assert [(s.id, s.labels, len(s.inputs)) for s in found] == [
        ("00.tar:a", ("x",), 1), ("00.tar:b", ("y",), 0), ("01.tar:c", ("x",), 1)]  # fmt: skip
    refused(lambda: read_labels(Manifest(tmp_path, "{00..01}.tar"), LABELS), "00.tar:b: no 'jpg;png'")


def test_a_column_that_no_record_has_is_named(tmp_path):
    shard(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.json", b'{"question": "q", "answer": "y"}')])
    refused(lambda: read_records(tmp_path / "0.tar", {"image": "jpg"}), "0.tar:a: no 'prompt'", "columns.prompt=NAME")
    (found,) = read_records(tmp_path / "0.tar", {"image": "jpg", "prompt": "question"})
    assert (found.prompt, found.answer) == ("q", "y")


@pytest.mark.parametrize(
    ("members", "info", "words"),
    [
        ([("/etc/a.jpg", b"x")], {}, "leads out of the archive"),
        ([("a/../../b.jpg", b"x")], {}, "leads out of the archive"),
        ([("a.jpg", b"")], {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is no plain file"),
        ([("a.jpg", b"")], {"type": tarfile.LNKTYPE, "linkname": "b.jpg"}, "is no plain file"),
        ([("a.jpg", b"")], {"type": tarfile.FIFOTYPE}, "is no plain file"),
        ([("README", b"x")], {}, "has no key or no extension"),
        ([(".jpg", b"x")], {}, "has no key or no extension"),
        ([*sample("a"), *sample("b"), *sample("a")], {}, "do not stand together, or stand twice"),
        ([*sample("a"), ("a.txt", b"other")], {}, "gives 'txt' a second time"),
        ([*sample("a"), ("a.json", b'{"txt": 1}')], {}, "gives 'txt' a second time"),
        ([*sample("a"), ("a.json", b"[1]")], {}, "a list instead of an object"),
        ([*sample("a"), ("a.json", b'{"a": 1, "a": 2}')], {}, "the key 'a' stands twice"),
        ([("a.txt", b"\xff\xfe")], {}, "is no text in UTF-8"),
        ([("a.cls", b"0" * ((1 << 24) + 1))], {}, "of text are allowed"),
    ],
)
def test_hostile_archives_are_one_line(tmp_path, members, info, words):
    shard(tmp_path / "0.tar", members, **info)
    refused(lambda: read_labels(tmp_path / "0.tar", LABELS), "0.tar", words)


def test_torn_archives_are_one_line(tmp_path):
    shard(tmp_path / "0.tar", [*sample("a"), *sample("b", "blue", "1")])
    whole = (tmp_path / "0.tar").read_bytes()
    end = whole.rindex(b"b.cls") + 1024  # the last member's header and content
    assert len(read_labels(tmp_path / "0.tar", LABELS)) == 2
    for size in (end, end - 512, end - 700, end - 1024 * 3, 512 * 2, 100, 0):  # between members, and within
        (tmp_path / "1.tar").write_bytes(whole[:size])
        refused(lambda: read_labels(tmp_path / "1.tar", LABELS), "1.tar", "write it again")
    (tmp_path / "1.tar").write_bytes(whole[: end - 1024] + b"\1" * 1024 + whole[end:])  # a damaged header
    refused(lambda: read_labels(tmp_path / "1.tar", LABELS), "is torn (its end mark is missing")


def test_a_place_that_is_none_is_refused(tmp_path):
    shard(tmp_path / "0.tar", sample("a"))
    refused(lambda: read_image(tmp_path, "0.tar#a.png"), "names no member")
    refused(lambda: read_image(tmp_path, "0.tar#000+999999999999/a.png"), "are allowed")
    refused(lambda: read_image(tmp_path, "0.tar#999999999+10/a.png"), "lies beyond the end of 0.tar")
    refused(lambda: read_image(tmp_path, "../0.tar#0+10/a.png"), "leads out of the data folder")
