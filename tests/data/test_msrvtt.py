"""MSR-VTT's own files, with their traps."""

import json

import pytest

from mitrain.core.errors import DataError
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.formats.msrvtt import read_msrvtt
from mitrain.data.released import MsrvttConfig

VIDEOS = [{"video_id": f"video{n}", "split": part, "id": n} for n, part in enumerate(("train", "validate", "test"))]
SENTENCES = [
    {"video_id": "video1", "sen_id": 7, "caption": "a man  sings"},
    {"video_id": "video0", "sen_id": 8, "caption": "a dog runs"},
    {"video_id": "video0", "sen_id": 9, "caption": " "},
    {"video_id": "video0", "sen_id": 10, "caption": "the dog"},
]


def write(root, videos=VIDEOS, sentences=SENTENCES, name="train_val_videodatainfo.json", folder="TrainValVideo"):
    (root / name).write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))
    (root / folder).mkdir(parents=True, exist_ok=True)
    for video in ("video0", "video1", "video2"):
        (root / folder / f"{video}.mp4").touch()
    return root


def test_captions_are_those_of_the_splits_videos(tmp_path, caplog):
    first, second = read_msrvtt(write(tmp_path), "train", ("video", "audio"))
    files = {"video": "TrainValVideo/video0.mp4", "audio": "TrainValVideo/video0.mp4"}
    assert first == CaptionSample("video0/8", files, "a dog runs", "video0")
    assert first.captions == second.captions == ("a dog runs", "the dog")
    assert "left out 1 wordless captions" in caplog.text


def test_several_files_are_one_data_set(tmp_path):
    write(tmp_path, VIDEOS[:2])
    write(tmp_path, VIDEOS[2:], [{"video_id": "video2", "sen_id": 1, "caption": "x"}], "test_videodatainfo.json")
    section = MsrvttConfig(root=str(tmp_path), inputs=("video",))
    assert section.split_names(tmp_path) == ["train", "val", "test"]
    assert [s.id for split in ("val", "test") for s in section.read(tmp_path, split)] == ["video1/7", "video2/1"]


def test_the_videos_folder_may_be_named(tmp_path):
    (found,) = read_msrvtt(write(tmp_path, folder="clips", name="MSRVTT_data.json"), "val", ("video",), "clips")
    assert found.inputs == {"video": "clips/video1.mp4"}
    with pytest.raises(DataError, match=r"no file 'video1\.mp4' in .*videos/all/ or videos/.*data\.videos"):
        read_msrvtt(tmp_path, "val", ("video",))


@pytest.mark.parametrize(
    ("videos", "sentences", "match"),
    [
        ({}, SENTENCES, r"train_val_videodatainfo\.json' has no list 'videos'"),
        (VIDEOS, None, "has no list 'sentences'"),
        ([{"video_id": "video0"}], SENTENCES, "video 0 has no 'split'"),
        (VIDEOS[1:], SENTENCES, "has no video of the split 'train'"),
        (VIDEOS, SENTENCES[:1], "has no caption in the split 'train'"),
        (VIDEOS, [{"video_id": "video0", "sen_id": 1}], "sentence 0 has no 'caption'"),
        (VIDEOS, [SENTENCES[1], SENTENCES[1]], "sentence 1: the id 'video0/8' stands twice"),
    ],
)
def test_faults_are_one_line_with_file_and_place(tmp_path, videos, sentences, match):
    with pytest.raises(DataError, match=match) as caught:
        read_msrvtt(write(tmp_path, videos, sentences), "train", ("video",))
    assert "\n" not in str(caught.value)


def test_a_folder_without_its_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file \*videodatainfo\*\.json or MSRVTT\*data\*\.json in"):
        read_msrvtt(tmp_path, "train", ("video",))
