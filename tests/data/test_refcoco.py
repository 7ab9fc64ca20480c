"""The real RefCOCO files are read right; hostile and broken ones are refused in one line."""

import gzip
import io
import json
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from refusals import read_or_refused
from tiny_refer import SQUARE, annotation, python2_pickle, ref, refer_folder

from mitrain.core.errors import DataError
from mitrain.data.formats.refcoco import ReferSample, image_folder, read_refer, split_names
from mitrain.data.formats.rle import decode_mask, decompress
from mitrain.data.images import open_image

SIZE = (9, 12)


def masks(seed: int, size=SIZE) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < 0.4


def refused(call, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# reading


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2_files_of_both_protocols(tmp_path, protocol):
    refs = [ref(1, "train", "the man on the left", "caf\xe9's owner"), ref(2, "val", "dog")]
    root = refer_folder(tmp_path, refs, [annotation(1, SQUARE), annotation(2, SQUARE)], protocol=protocol)
    samples = read_refer(root, "refcoco", "unc", "train")
    assert [sample.expression for sample in samples] == ["the man on the left", "caf\xe9's owner"]
    assert [sample.id for sample in samples] == ["refcoco/1/10", "refcoco/1/11"]
    assert samples[0].size == SIZE and samples[0].object == "person"
    assert open_image(image_folder(root, "refcoco"), samples[0].inputs["image"]).size == (12, 9)
    expected = np.zeros(SIZE, bool)
    expected[1:5, 2:8] = True
    assert np.array_equal(samples[0].mask(), expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_python_3_files_of_every_protocol(tmp_path, protocol):
    root = refer_folder(tmp_path, [ref(1, "train", "x")], [annotation(1, SQUARE)])
    refs = [ref(1, "train", "the naïve 男") | {"extra": (1.5, None, True, b"" if protocol >= 3 else "")}]
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    assert [sample.expression for sample in read_refer(root, "refcoco", None, "train")] == ["the naïve 男"]


def test_a_sample_knows_all_objects_of_its_picture(tmp_path):
    """Also those of other splits and those that no expression refers to; one without a category has no name."""
    other = annotation(3, SQUARE, image=2) | {"category_id": 9}
    annotations = [annotation(1, SQUARE), annotation(2, SQUARE) | {"category_id": 8}, other]
    annotations += [annotation(4, SQUARE) | {"category_id": 99}, annotation(5, SQUARE)]
    root = refer_folder(tmp_path, [ref(1, "val", "x"), ref(3, "val", "y", image=2)], annotations)
    path = root / "refcoco" / "instances.json"
    tables = json.loads(path.read_text())
    tables["categories"] = [{"id": number, "name": name} for number, name in ((7, "person"), (8, "dog"), (9, "cup"))]
    tables["annotations"][-1]["image_id"] = None
    path.write_text(json.dumps(tables))
    first, second = read_refer(root, "refcoco", None, "val")
    assert (first.object, first.present) == ("person", ("dog", "person"))
    assert (second.object, second.present) == ("cup", ("cup",))


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2_strings_may_be_utf_8(tmp_path, protocol):
    written = "the caf\xe9 on the left"
    refs = [ref(1, "train", written.encode().decode("latin1"), written)]
    root = refer_folder(tmp_path, refs, [annotation(1, SQUARE)], protocol=protocol)
    assert [sample.expression for sample in read_refer(root, "refcoco", "unc", "train")] == [written] * 2


def test_every_split_is_selected_as_refer_py_does(tmp_path):
    splits = ["train", "val", "test", "testA", "testB", "testC", "testAB", "testBC", "trainA"]
    refs = [ref(number, split, split) for number, split in enumerate(splits)]
    root = refer_folder(tmp_path, refs, [annotation(number, SQUARE) for number in range(len(splits))])

    def chosen(split):
        return [sample.expression for sample in read_refer(root, "refcoco", "unc", split)]

    assert chosen("train") == ["train"] and chosen("val") == ["val"]
    assert chosen("test") == ["test", "testA", "testB", "testC", "testAB", "testBC"]
    assert chosen("testA") == ["testA", "testAB"]
    assert chosen("testB") == ["testB", "testAB", "testBC"]
    assert chosen("testC") == ["testC", "testBC"]
    assert chosen("testAB") == ["testAB"]
    assert sorted(split_names(root, "refcoco")) == sorted(splits)
    refused(lambda: chosen("valid"), "no references in the split 'valid': choose one of .*val")


@pytest.mark.parametrize(
    ("dataset", "split_by", "images"),
    [
        ("refcoco", "google", "images/mscoco/images/train2014"),
        ("refcoco+", "unc", "images/train2014"),
        ("refcocog", "umd", "train2014"),
        ("refclef", "berkeley", "images/saiapr_tc-12"),
    ],
)
def test_every_data_set_and_its_picture_folder(tmp_path, dataset, split_by, images):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)], dataset, split_by, images)
    (sample,) = read_refer(root, dataset, None, "val")
    assert image_folder(root, dataset) == root / images
    assert open_image(image_folder(root, dataset), sample.inputs["image"]).size == (12, 9)


def test_the_picture_folder_may_be_elsewhere(tmp_path):
    root = refer_folder(tmp_path / "root", [ref(1, "val", "x")], [annotation(1, SQUARE)], images="odd/place")
    refused(lambda: read_refer(root, "refcoco", None, "val"), r"no picture folder .* set data\.images=FOLDER")
    (sample,) = read_refer(root, "refcoco", None, "val", images="odd/place")
    os.rename(root / "odd", tmp_path / "odd")
    outside = str(tmp_path / "odd" / "place")
    assert read_refer(root, "refcoco", None, "val", images=outside) == [sample]
    os.symlink(tmp_path / "odd" / "place", root / "train2014")
    assert open_image(image_folder(root, "refcoco"), sample.inputs["image"]).size == (12, 9)


def test_one_of_several_splits_must_be_named(tmp_path):
    refs, annotations = [ref(1, "val", "x")], [annotation(1, SQUARE)]
    refer_folder(tmp_path, refs, annotations, split_by="unc")
    root = refer_folder(tmp_path, refs, annotations, split_by="google")
    refused(lambda: read_refer(root, "refcoco", None, "val"), "choose data.split_by from: google, unc")
    refused(lambda: read_refer(root, "refcoco", "umd", "val"), r"no refs\(umd\)\.p .*: google, unc")
    assert len(read_refer(root, "refcoco", "google", "val")) == 1
    refused(lambda: read_refer(root, "refcocog", None, "val"), "no folder 'refcocog'")
    (root / "empty").mkdir()
    refused(lambda: read_refer(root, "empty", None, "val"), "choose data.split_by from: none")


def test_a_wordless_sentence_falls_back_to_the_raw_one_or_is_left_out(tmp_path, caplog):
    refs = [ref(1, "val", "", "dog", "cat")]
    refs[0]["sentences"][1]["sent"] = " "
    root = refer_folder(tmp_path, refs, [annotation(1, SQUARE)])
    assert [sample.expression for sample in read_refer(root, "refcoco", None, "val")] == ["DOG", "cat"]
    assert "left out 1 sentences" in caplog.text


@pytest.mark.parametrize("sentences", [[], ["", " "]])
def test_a_split_without_any_words_is_refused(tmp_path, sentences):
    refs = [ref(1, "val", *sentences)]
    for sentence in refs[0]["sentences"]:
        sentence["raw"] = " "
    root = refer_folder(tmp_path, refs, [annotation(1, SQUARE)])
    refused(lambda: read_refer(root, "refcoco", None, "val"), "no sentence with words in the split 'val'")


@pytest.mark.parametrize("name", ["refs(unc).p", "instances.json"])
def test_compressed_files_are_named_as_such(tmp_path, name):
    root = refer_folder(tmp_path, [ref(1, "val", "dog")], [annotation(1, SQUARE)])
    path = root / "refcoco" / name
    path.write_bytes(gzip.compress(path.read_bytes()))
    refused(lambda: read_refer(root, "refcoco", None, "val"), "is compressed: unpack it")


def test_a_changed_file_is_read_again(tmp_path):
    root = refer_folder(tmp_path, [ref(1, "val", "first")], [annotation(1, SQUARE)])
    assert read_refer(root, "refcoco", None, "val")[0].expression == "first"
    refer_folder(tmp_path, [ref(1, "val", "second time")], [annotation(1, SQUARE)])
    assert read_refer(root, "refcoco", None, "val")[0].expression == "second time"


# masks


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [SIZE, (1, 1), (40, 70)])
def test_all_forms_of_one_mask_agree(seed, size):
    mask = masks(seed, size)
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": list(size), "counts": packed["counts"].decode()}
    runs = {"size": list(size), "counts": decompress(packed["counts"])}
    for form in (packed, text, runs, [text], [text, runs]):
        assert np.array_equal(decode_mask(form, size), mask)


def test_large_runs_and_negative_changes_are_decompressed():
    mask = np.zeros((300, 400), bool)
    mask[:, 3], mask[7, 9], mask[:, 50:390] = True, True, True
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert np.array_equal(decode_mask(packed, (300, 400)), mask)


def test_a_string_that_ends_within_a_number_is_refused():
    packed = coco.encode(np.asfortranarray(masks(0).astype(np.uint8)))
    assert decode_mask(packed, SIZE).any()
    with pytest.raises(ValueError, match="end within a number"):  # pycocotools reads on past its end
        decode_mask(packed | {"counts": packed["counts"] + b"P"}, SIZE)


def test_polygons_agree_with_run_lengths_and_parts_are_united():
    square = np.zeros(SIZE, bool)
    square[1:5, 2:8] = True
    packed = coco.encode(np.asfortranarray(square.astype(np.uint8)))
    assert np.array_equal(decode_mask(SQUARE, SIZE), decode_mask(packed, SIZE))
    other = [9, 6, 12, 6, 12, 9, 9, 9]
    both = decode_mask([*SQUARE, other], SIZE)
    assert np.array_equal(both, square | decode_mask([other], SIZE)) and both.sum() == 24 + 9
    overlapping = decode_mask([SQUARE[0], [3, 2, 6, 2, 6, 4, 3, 4]], SIZE)
    assert np.array_equal(overlapping, square)  # a union, not a sum and not even-odd


@pytest.mark.parametrize("sliver", [[3, 2, 6, 2], [3, 2]])
def test_slivers_beside_a_polygon_cover_nothing(sliver):
    """As in COCO's own annotations."""
    for parts in ([*SQUARE, sliver], [sliver, *SQUARE]):
        assert np.array_equal(decode_mask(parts, SIZE), decode_mask(SQUARE, SIZE))


def test_a_polygon_that_reaches_outside_is_cut():
    assert decode_mask([[-5, -5, 30, -5, 30, 30, -5, 30]], SIZE).all()


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        {},
        None,
        "abc",
        [[]],
        [[1, 2, 3, 4]],  # pycocotools would take it for a box
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, "4", 5, 6]],
        [[1, 2, 3, True, 5, 6]],
        [[1, 2, 3, float("nan"), 5, 6]],
        [[1, 2, 3, 1e9, 5, 6]],
        [1, 2, 3, 4, 5, 6],
        [[[1, 2], [3, 4], [5, 6]]],
        {"size": [9, 12]},
        {"size": [9, 12], "counts": None},
        {"size": [9, 12], "counts": [100]},
        {"size": [9, 12], "counts": [-1, 109]},
        {"size": [9, 12], "counts": [10**30]},
        {"size": [9, 12], "counts": [108.0]},
        {"size": [12, 9], "counts": [108]},
        {"size": 108, "counts": [108]},
        {"size": [9, 12], "counts": "o"},  # ends within a number: pycocotools reads past the end
        {"size": [9, 12], "counts": "oooooooooooooooooooo0"},
        {"size": [9, 12], "counts": "\u00e9"},
        {"size": [9, 12], "counts": "~~"},
    ],
)
def test_broken_segmentations_are_refused(segmentation):
    with pytest.raises(DataError, match="the segmentation of s is broken"):
        ReferSample("s", {"image": "a.jpg"}, "x", SIZE, segmentation).mask()
    assert ReferSample("s", {"image": "a.jpg"}, "x", SIZE, segmentation).fault().startswith("its segmentation is broken: ")


# hostile and broken files


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/mitrain-was-here",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_a_function_is_refused_and_does_nothing(tmp_path, protocol, monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", called.append)
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Evil()], protocol=protocol))
    refused(lambda: read_refer(root, "refcoco", None, "val"), r"more than plain values \(opcode (STACK_)?GLOBAL")
    assert not called


@pytest.mark.parametrize(
    "value",
    [{1, 2}, bytearray(b"x"), np.int64(3), np.zeros(2), ValueError("x"), complex(1, 2), range(3), os.getcwd],
    ids=lambda value: type(value).__name__,
)
def test_whatever_needs_a_name_is_refused(tmp_path, value):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([ref(1, "val", "x") | {"extra": value}], protocol=2))
    refused(lambda: read_refer(root, "refcoco", None, "val"), "more than plain values")


def test_every_opcode_that_runs_code_is_refused(tmp_path):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    running = "GLOBAL STACK_GLOBAL REDUCE BUILD INST OBJ NEWOBJ NEWOBJ_EX EXT1 EXT2 EXT4 PERSID BINPERSID NEXT_BUFFER"
    for opcode in pickletools.opcodes:
        if opcode.name in running.split():
            (root / "refcoco" / "refs(unc).p").write_bytes(b"\x80\x02]" + opcode.code.encode("latin1") + b"1\n1\n.")
            refused(lambda: read_refer(root, "refcoco", None, "val"), f"opcode {opcode.name}\\)")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x02]",
        b"not a pickle",
        b"\x80\x02]q",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x63].",
        b"I1.5\n.",
    ],
)
def test_torn_pickles_are_refused(tmp_path, content):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    (root / "refcoco" / "refs(unc).p").write_bytes(content)
    refused(lambda: read_refer(root, "refcoco", None, "val"), r"refs\(unc\)\.p")


def test_a_pickle_that_asks_for_gigabytes_gets_none(tmp_path):
    """The C unpickler would allocate 2**34 pointers for this memo entry."""
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    body = python2_pickle([ref(1, "val", "x")], 2)[2:-1]
    (root / "refcoco" / "refs(unc).p").write_bytes(b"\x80\x02" + body + b"r" + struct.pack("<I", 2**31 - 1) + b".")
    assert len(read_refer(root, "refcoco", None, "val")) == 1


@pytest.mark.parametrize("value", [None, 3, "x", {}, [], [3], ["x"], [[]], [{}]])
def test_a_pickle_of_something_else_is_refused(tmp_path, value):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(value))
    refused(lambda: read_refer(root, "refcoco", None, "val"), r"refs\(unc\)\.p")


@pytest.mark.parametrize("key", ["ref_id", "ann_id", "image_id", "split", "sentences"])
@pytest.mark.parametrize("value", ["absent", None, 1.5, True, [None], {}, 10**400])
def test_a_missing_or_wrong_field_is_named(tmp_path, key, value):
    broken = ref(2, "val", "x") | {key: value}
    if value == "absent":
        del broken[key]
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([ref(1, "val", "x"), broken]))
    match = "reference 1 is a" if (key, value) == ("sentences", [None]) else f"reference 1 has .*{key}"
    refused(lambda: read_refer(root, "refcoco", None, "val"), match if value != [None] else "reference 1")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("images"), "no 'images'"),
        (lambda t: t.update(annotations={}), "annotations=a dict"),
        (lambda t: t["images"].append(3), "image 1 is 3 instead of a dictionary"),
        (lambda t: t["images"].clear(), "image_id=1, which .* lacks"),
        (lambda t: t["annotations"].clear(), "ann_id=101, which .* lacks"),
        (lambda t: t["annotations"][0].update(image_id=2), "different images"),
        (lambda t: t["annotations"][0].pop("segmentation"), "annotation 101 has no 'segmentation'"),
        (lambda t: t["annotations"][0].update(segmentation="x"), "impossible segmentation"),
        (lambda t: t["annotations"][0].update(id=None), "annotation 0 has the impossible id"),
        (lambda t: t["images"][0].pop("height"), "image 1 has no 'height'"),
        (lambda t: t["images"][0].update(width="12"), "impossible width"),
        (lambda t: t["images"][0].update(width=-12), "impossible height and width"),
        (lambda t: t["images"][0].update(width=10**9, height=10**9), "impossible height and width"),
        (lambda t: t["images"][0].update(file_name=None), "impossible file_name"),
        (lambda t: t.update(categories=[3]), "category 0"),
    ],
)
def test_faults_of_the_instances_are_named(tmp_path, change, match):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    path = root / "refcoco" / "instances.json"
    tables = json.loads(path.read_text())
    change(tables)
    path.write_text(json.dumps(tables))
    refused(lambda: read_refer(root, "refcoco", None, "val"), match)


def test_categories_are_optional(tmp_path):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    path = root / "refcoco" / "instances.json"
    tables = json.loads(path.read_text())
    del tables["categories"]
    path.write_text(json.dumps(tables))
    assert read_refer(root, "refcoco", None, "val")[0].object == ""


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b'{"images": 1e999}'])
def test_torn_instances_are_refused(tmp_path, content):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    (root / "refcoco" / "instances.json").write_bytes(content)
    refused(lambda: read_refer(root, "refcoco", None, "val"), r"instances\.json")
    (root / "refcoco" / "instances.json").unlink()
    refused(lambda: read_refer(root, "refcoco", None, "val"), r"cannot read .*instances\.json")


def test_file_names_cannot_lead_out_of_the_picture_folder(tmp_path):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    path = root / "refcoco" / "instances.json"
    path.write_text(path.read_text().replace("COCO_train2014_000000000001.jpg", "../../../../refcoco/instances.json"))
    (sample,) = read_refer(root, "refcoco", None, "val")
    refused(lambda: open_image(image_folder(root, "refcoco"), sample.inputs["image"]), "leads out")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return refer_folder(tmp_path_factory.mktemp("fuzz"), [ref(1, "val", "x")], [annotation(1, SQUARE)])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), protocol=st.integers(0, 5))
def test_altered_pickles_never_end_in_a_traceback(fuzzed, data, protocol):
    refs = [ref(1, "val", "x", "dog"), ref(2, "train", "cat")]
    content = bytearray(pickle.dumps(refs, protocol=protocol))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5)):
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    check_read_or_refused(fuzzed, "refs(unc).p", bytes(content))


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*ref(1, "val", "x")]), VALUES), sentence=VALUES, text=VALUES)
def test_strange_references_never_end_in_a_traceback(fuzzed, changes, sentence, text):
    strange = ref(1, "val", "x") | changes
    if isinstance(strange["sentences"], list):
        strange["sentences"] = [*strange["sentences"], sentence, {"sent_id": 1, "sent": text, "raw": text}]
    check_read_or_refused(fuzzed, "refs(unc).p", pickle.dumps([ref(2, "val", "x") | {"ann_id": 101}, strange]))


@settings(max_examples=200, deadline=None)
@given(
    image=st.dictionaries(st.sampled_from(["id", "height", "width", "file_name"]), VALUES),
    part=st.dictionaries(st.sampled_from(["id", "image_id", "segmentation", "category_id"]), VALUES),
)
def test_strange_instances_never_end_in_a_traceback(fuzzed, image, part):
    plain = {"id": 1, "height": 9, "width": 12, "file_name": "a.jpg"}
    tables = {"images": [plain | image], "annotations": [annotation(1, SQUARE) | part], "categories": [part]}
    content = json.dumps(tables, default=str).encode()
    (fuzzed / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([ref(1, "val", "x")]))
    check_read_or_refused(fuzzed, "instances.json", content)


def check_read_or_refused(root, name: str, content: bytes) -> None:
    path = root / "refcoco" / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        for sample in read_or_refused(lambda: read_refer(root, "refcoco", None, "val"), DataError) or ():
            read_or_refused(sample.mask, DataError)
    finally:
        path.write_bytes(before)


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12), runs=st.lists(st.integers(-5, 200)))
def test_any_run_lengths_are_decoded_or_refused(text, runs):
    for counts in (text, runs):
        mask = read_or_refused(lambda counts=counts: decode_mask({"size": [9, 12], "counts": counts}, SIZE), ValueError)
        assert mask is None or mask.shape == SIZE
        assert (mask is None) == bool(
            ReferSample("s", {"image": "a.jpg"}, "x", SIZE, {"size": [9, 12], "counts": counts}).fault()
        )


def test_the_written_pickles_are_what_python_2_would_write():
    value = [{"a": 1, "b": ["x'y", -2]}]
    for protocol in (0, 2):
        assert pickle.load(io.BytesIO(python2_pickle(value, protocol)), encoding="latin1") == value


# ids, and what tools other than the authors' write


def changed_instances(root, change) -> None:
    path = root / "refcoco" / "instances.json"
    tables = json.loads(path.read_text())
    change(tables)
    path.write_text(json.dumps(tables))


@pytest.mark.parametrize("kind", [str, float, lambda number: f"{number}.0"])
def test_equal_ids_in_other_spellings_match(tmp_path, kind):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)])
    expected = read_refer(root, "refcoco", None, "val")

    def spell(tables):
        for row in (*tables["images"], *tables["annotations"], *tables["categories"]):
            row |= {key: kind(row[key]) for key in ("id", "image_id", "category_id") if key in row}

    changed_instances(root, spell)
    assert read_refer(root, "refcoco", None, "val") == expected and expected[0].object == "person"


TOP = [[0, 0, 3, 0, 3, 1, 0, 1]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t["annotations"].append(t["annotations"][0] | {"segmentation": TOP}),
            "annotation 2 has the id '101' of",
        ),
        (
            lambda t: t["annotations"].append(t["annotations"][0] | {"id": "101"}),
            "annotation 2 has the id '101' of another",
        ),
        (lambda t: t["images"].append(t["images"][0] | {"height": 5}), "image 1 has the id '1' of another image"),
        (lambda t: t["categories"].append({"id": 7, "name": "dog"}), "category 1 has the id '7' of another category"),
    ],
)
def test_an_id_that_stands_twice_is_refused_by_name(tmp_path, change, said):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE), annotation(2, SQUARE)])
    changed_instances(root, change)
    refused(lambda: read_refer(root, "refcoco", None, "val"), said + r".*: make ids unique")


def test_a_sentence_that_stands_twice_is_refused_and_an_equal_annotation_counts_once(tmp_path):
    root = refer_folder(tmp_path, [ref(1, "val", "x"), ref(1, "train", "y")], [annotation(1, SQUARE)])
    refused(lambda: read_refer(root, "refcoco", None, "val"), "ref_id=1 with sent_id=10 stands twice: make ids unique")
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE)] * 2)
    assert len(read_refer(root, "refcoco", None, "val")) == 1


@pytest.mark.parametrize("name", ["refs(unc).json", "grefs(unc).json"])
def test_references_as_json_of_several_targets_and_of_none(tmp_path, name, caplog):
    root = refer_folder(tmp_path, [ref(1, "val", "x")], [annotation(1, SQUARE), annotation(2, TOP)])
    one, both, none, empty = (ref(number, "val", text) for number, text in enumerate(["one", "both", "none", "empty"], 1))
    refs = [one | {"ann_id": [101]}, both | {"ann_id": [101, 102.0]}, none | {"ann_id": [-1]}, empty | {"ann_id": []}]
    (root / "refcoco" / name).write_text(json.dumps(refs))
    refused(
        lambda: read_refer(root, "refcoco", "unc", "val"),
        r"refs\(unc\)\.p and .*refs\(unc\)\.json .*: remove all but one",
    )
    (root / "refcoco" / "refs(unc).p").unlink()
    first, second = read_refer(root, "refcoco", None, "val")
    square, top = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    square[1:5, 2:8] = top[0:1, 0:3] = True
    assert np.array_equal(first.mask(), square) and np.array_equal(second.mask(), square | top)
    assert (first.expression, second.expression, second.object) == ("one", "both", "person") and not second.fault()
    assert "left out 2 sentences without a target in the split val" in caplog.text
