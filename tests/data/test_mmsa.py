"""MMSA's pickles and tables: texts, labels, and clips as arrays or as videos, with their traps."""

import pickle

import numpy as np
import pytest

from mitrain.core.errors import DataError
from mitrain.data.arrays import read_array
from mitrain.data.formats.mmsa import parts_in, read_clips, read_features
from mitrain.data.formats.targets import TargetSample

NAME = "unaligned_50.pkl"


def part(**changes):
    audio = np.arange(24, dtype=np.float32).reshape(2, 4, 3) + 1
    audio[0, 0, 0], audio[1, 2:] = -np.inf, 0
    vision = np.zeros((2, 4, 2), np.float64)
    vision[0, 1:3] = 5
    values = {
        "id": ["03bSnISJMiM$_$11", "03bSnISJMiM$_$13"],
        "raw_text": np.array(["IT  WAS GOOD", "NOT BAD"]),
        "regression_labels": np.array([2.4, -1.0], np.float32),
        "annotations": np.array(["Positive", "Negative"], object),
        "audio": audio,
        "audio_lengths": [3, 2],
        "vision": vision,
        "text_bert": np.zeros((2, 3, 4)),
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def write(root, tree=None):
    (root / NAME).write_bytes(pickle.dumps({"train": part(), "valid": part()} if tree is None else tree))
    return root


def read(root, split="train", inputs=("audio", "video"), labels="regression_labels"):
    return read_features(root, NAME, split, inputs, labels)


def test_clips_have_texts_labels_and_the_place_of_their_arrays(tmp_path):
    first, second = read(write(tmp_path), "val")
    places = {"audio": f"{NAME}#valid/audio/0", "video": f"{NAME}#valid/vision/0"}
    target = float(np.float32(2.4))
    assert first == TargetSample("03bSnISJMiM$_$11", places, "IT WAS GOOD", target, "03bSnISJMiM", "Positive")
    assert second.target == -1.0 and second.object == first.object and parts_in(tmp_path, NAME) == ["train", "val"]


def test_arrays_end_with_their_clip_and_silence_is_no_infinity(tmp_path):
    write(tmp_path)
    audio = read_array(tmp_path, f"{NAME}#train/audio/0").values
    assert audio.tolist() == [[0, 2, 3], [4, 5, 6], [7, 8, 9]]  # of length 3; −∞ is 0
    assert read_array(tmp_path, f"{NAME}#train/audio/1").values.shape == (2, 3)
    assert read_array(tmp_path, f"{NAME}#train/vision/0").values.tolist() == [[5, 5]] * 2  # no lengths: zeros are padding
    assert read_array(tmp_path, f"{NAME}#train/vision/1").values.tolist() == [[0, 0]]  # nothing was found in that clip


@pytest.mark.parametrize("array", [np.full((2, 4, 3), np.nan), np.full((2, 4, 3), np.inf)])
def test_other_numbers_that_are_none_are_refused(tmp_path, array):
    write(tmp_path, {"train": part(audio=array)})
    with pytest.raises(DataError, match=r"unaligned_50\.pkl#train/audio/0' .* no finite number"):
        read_array(tmp_path, f"{NAME}#train/audio/0")


@pytest.mark.parametrize(
    "place", ["", "train", "train/audio", "train/audio/x", "train/audio/2", "train/id/0", "dev/audio/0"]
)
def test_places_that_are_none_are_refused(tmp_path, place):
    write(tmp_path)
    with pytest.raises(DataError, match="has no arrays|names the row"):
        read_array(tmp_path, f"{NAME}#{place}")


@pytest.mark.parametrize("lengths", [[5, 2], [-1, 2]])
def test_lengths_beyond_the_rows_are_refused(tmp_path, lengths):
    write(tmp_path, {"train": part(audio_lengths=lengths)})
    with pytest.raises(DataError, match=f"says that clip 0 has {lengths[0]} of 4 rows"):
        read_array(tmp_path, f"{NAME}#train/audio/0")


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ([1], "holds a list instead of a dictionary of splits"),
        ({"test": part()}, "has no part 'train', only test"),
        (
            {"train": part(raw_text=None)},
            "train has no 'raw_text', .*: this is a file of features alone",
        ),
        ({"train": part(raw_text=["a"])}, "has 2 clips and 1 in 'raw_text'"),
        ({"train": part(raw_text=["a", 1])}, "has no list of texts 'raw_text'"),
        ({"train": part(raw_text=["a", "\ud800"])}, "has no list of texts 'raw_text'"),
        ({"train": part(regression_labels=[1.0, np.nan])}, "clip 1 has the label nan"),
        ({"train": part(regression_labels=["a", "b"])}, "'regression_labels' that are no numbers"),
        ({"train": part(regression_labels=np.ones((2, 2)))}, r"of shape \(2, 2\), not one number a clip"),
        ({"train": part(id=["a", "a"])}, "clip 1: the id 'a' stands twice"),
        ({"train": part(audio=None)}, "has no 'audio'"),
        ({"train": part(audio=np.zeros((2, 3)))}, r"no arrays \(N, T, e\) in 'audio'"),
        ({"train": part(audio=np.zeros((3, 4, 3)))}, "has 2 clips and 3 in 'audio'"),
        (b"\x80\x04cos\nsystem\n.", "it names os.system"),
    ],
)
def test_faults_are_one_line_with_file_and_part(tmp_path, tree, match):
    if isinstance(tree, bytes):
        (tmp_path / NAME).write_bytes(tree)
    else:
        write(tmp_path, tree)
    with pytest.raises(DataError, match=match) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and NAME in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*unaligned_50\.pkl"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"unaligned_50\.pkl"):
        read_array(tmp_path, f"{NAME}#train/audio/0")


def test_labels_of_one_modality_and_shapes_of_old(tmp_path):
    write(tmp_path, {"train": part(regression_labels_A=np.array([[[0.5]], [[-0.5]]]), id=np.array([["a"], ["b"]]))})
    found = read(tmp_path, labels="regression_labels_A", inputs=())
    assert [(s.id, s.target) for s in found] == [("a", 0.5), ("b", -0.5)]


TABLE = """video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode
v1,1,"Good, it was",0.8,1,0.6,0.4,Positive,train
v1,0002,,-0.2,0,0,0,Negative,train
v2,1,fine,0,0,0,0,Neutral,valid
"""


def written(root, text=TABLE):
    (root / "label.csv").write_text(text, encoding="utf-8-sig")
    for clip in ("v1/0001", "v1/0002", "v2/1"):
        path = root / "Raw" / f"{clip}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def clips(root, split="train", labels="label", inputs=("video", "audio")):
    return read_clips(root, "label.csv", split, inputs, labels, "Raw")


def test_rows_of_a_table_are_clips_whose_sound_lies_in_the_video(tmp_path):
    first, second = clips(written(tmp_path))
    files = {"video": "Raw/v1/0001.mp4", "audio": "Raw/v1/0001.mp4"}  # a spreadsheet took the zeros of the first away
    assert first == TargetSample("v1$_$1", files, "Good, it was", 0.8, "v1", "Positive")
    assert (second.text, second.target, second.object) == ("", -0.2, "v1")
    (found,) = clips(tmp_path, "val", "label_A", ("video",))
    assert found == TargetSample("v2$_$1", {"video": "Raw/v2/1.mp4"}, "fine", 0.0, "v2", "Neutral")
    assert parts_in(tmp_path, "label.csv") == ["train", "val"]


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("video_id", "video", r"label\.csv:1: no column 'video_id'"),
        ("mode", "split", r"label\.csv:1: no column 'mode'"),
        ("0.8,1", "much,1", r"label\.csv:2: 'label' is 'much', no number"),
        ("v1,0002", ",0002", r"label\.csv:3: no 'video_id'"),
        ("v1,0002", "v1,1", r"label\.csv:3: the id 'v1\$_\$1' stands twice"),
        ("train", "dev", r"label\.csv' has no row of the mode 'train'"),
    ],
)
def test_faults_of_a_table_are_one_line(tmp_path, old, new, match):
    with pytest.raises(DataError, match=match) as caught:
        clips(written(tmp_path, TABLE.replace(old, new)))
    assert "\n" not in str(caught.value)
