"""Frames are taken by their timestamps, at any frame rate; every trap is a DataError that names the file."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from clips import tone, video, with_cover
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import read_or_refused

from mitrain.core.errors import DataError
from mitrain.data import containers
from mitrain.data.audio import read_audio
from mitrain.data.video import VideoLimits, read_video

TIMES = (0, 0.1, 0.2, 1.5, 1.6, 3.0)


def put(folder: Path, content: bytes, name: str = "a.mkv") -> str:
    (folder / name).write_bytes(content)
    return name


def refused(folder: Path, name: str, match: str, frames: int = 4, **limits) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read_video(folder, name, frames, VideoLimits(**limits))
    assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


def numbers(frames: tuple[Image.Image, ...]) -> list[int]:
    """Which of `clips.grey` they are."""
    return [round((np.asarray(frame)[:, -4:].mean() - 40) / 20) for frame in frames]


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("matroska", "libx264", {}),
        ("matroska", "libx264", {"bf": "2", "g": "3"}),
        ("mp4", "libx264", {"bf": "2"}),
        ("mp4", "mpeg4", {}),
        ("webm", "libvpx-vp9", {}),
        ("avi", "mpeg4", {}),
        ("mpegts", "libx264", {}),
    ],
)
def test_frames_are_those_shown_at_their_times(tmp_path, container, codec, options):
    name = put(tmp_path, video(TIMES, container, codec, **options))
    found = read_video(tmp_path, name, 6)
    # The middles of six parts of 3 s and a little: 0.25, 0.76, 1.27, 1.77, 2.28, 2.79. Where no packet says how long it is
    # shown, the last frame is shown for 0.6 s, the mean of the others: 0.3, 0.9, 1.5, 2.1, 2.7, 3.3.
    expected = [2, 2, 3, 4, 4, 5] if container in ("avi", "mpegts") else [2, 2, 2, 4, 4, 4]
    assert numbers(found.frames) == expected
    start = 0.2 if container == "mpegts" else 0
    np.testing.assert_allclose(found.times, [TIMES[number] + start for number in expected], atol=2e-3)
    assert all(frame.mode == "RGB" and frame.size == (32, 24) for frame in found.frames)
    assert found.digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_an_even_frame_rate_gives_the_middle_of_each_part(tmp_path):
    name = put(tmp_path, video([n / 10 for n in range(9)], rate=10))
    assert numbers(read_video(tmp_path, name, 3).frames) == [1, 4, 7]
    assert numbers(read_video(tmp_path, name, 1).frames) == [4]
    assert numbers(read_video(tmp_path, name, 18).frames) == [n // 2 for n in range(18)]


def decoded_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each run of packets that is decoded from now on, how many they are."""
    runs, decoded = [], containers.decoded
    monkeypatch.setattr(
        "mitrain.data.video.decoded", lambda context, given: decoded(context, [runs.append(len(r)) or r for r in given])
    )
    return runs


def test_only_what_a_frame_needs_is_decoded(tmp_path, monkeypatch):
    name = put(tmp_path, video([n / 10 for n in range(9)], "matroska", "libx264", g="3", bf="0", sc_threshold="0"))
    runs = decoded_runs(monkeypatch)
    assert numbers(read_video(tmp_path, name, 1).frames) == [4]
    assert runs == [2]  # the key frame 3, and 4


def test_what_is_shown_before_a_key_frame_may_need_the_one_before_it(tmp_path, monkeypatch):
    groups = {"x264-params": "open-gop=1:keyint=6:min-keyint=6:bframes=2:b-adapt=0:scenecut=0"}
    name = put(tmp_path, video([n / 10 for n in range(23)], rate=10, **groups))
    runs = decoded_runs(monkeypatch)
    assert numbers(read_video(tmp_path, name, 1).frames) == [1]  # frame 11, which lies behind key frame 12 in the file
    assert runs == [9]  # from key frame 6: 4, 5, 9, 7, 8, 12, 10, 11


def test_frames_whose_packets_have_no_times_are_found(tmp_path, monkeypatch):
    name = put(tmp_path, video(TIMES))
    expected = read_video(tmp_path, name, 6)
    calls, shown_at = [], __import__("mitrain.data.video", fromlist=["shown_at"]).shown_at
    # As where a packet shows nothing: the first choice is of a time that no frame has
    monkeypatch.setattr(
        "mitrain.data.video.shown_at",
        lambda *given: calls.append(given) or ([7] * 6 if len(calls) == 1 else shown_at(*given)),
    )
    found = read_video(tmp_path, name, 6)
    assert len(calls) == 2 and found.times == expected.times
    assert numbers(found.frames) == numbers(expected.frames)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_video_stands_upright(tmp_path, degrees):
    content = bytearray(video(container="mp4", codec="libx264", size=(64, 32)))
    put(tmp_path, bytes(content), "straight.mp4")
    one, none = (1 << 16).to_bytes(4, "big"), bytes(4)
    minus = (2**32 - (1 << 16)).to_bytes(4, "big")
    rows = {90: (none, one, minus, none), 180: (minus, none, none, minus), 270: (none, minus, one, none)}
    a, b, c, d = rows[degrees]
    at = content.index(b"tkhd") + 4 + 40  # the matrix of version 0
    content[at : at + 36] = a + b + none + c + d + none + none + none + (1 << 30).to_bytes(4, "big")
    put(tmp_path, bytes(content), "turned.mp4")
    straight, turned = (read_video(tmp_path, f"{name}.mp4", 1).frames[0] for name in ("straight", "turned"))
    clockwise = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(straight.transpose(clockwise[degrees])))


def test_bad_files_are_one_line(tmp_path):
    put(tmp_path, video(times=(), sound=tone()))
    refused(tmp_path, "a.mkv", "has no frames")
    put(tmp_path, b"these are words\n" * 9)
    refused(tmp_path, "a.mkv", "is no readable video")
    put(tmp_path, b"")
    refused(tmp_path, "a.mkv", "is no readable video")
    put(tmp_path, video()[:200])
    refused(tmp_path, "a.mkv", "has no frames|no readable video")
    put(tmp_path, video(container="mp4")[:-300])  # its table of contents is at the end
    refused(tmp_path, "a.mkv", "is no readable video")
    put(tmp_path, video())
    refused(tmp_path, "a.mkv", "has frames of 32 x 24 pixels, 700 are allowed", pixels=700)
    refused(tmp_path, "a.mkv", "lasts 3 s, 2 s are allowed", seconds=2)
    refused(tmp_path, "../a.mkv", "leads out of the data folder")
    refused(tmp_path, "b.mkv", "no video 'b.mkv'")
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png")  # FFmpeg would read it as a video of one frame
    refused(tmp_path, "a.png", "is no readable video")
    put(tmp_path, b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", "a.m3u8")
    refused(tmp_path, "a.m3u8", "is no readable video")
    put(tmp_path, video(sound=tone()))
    refused(tmp_path, "a.mkv", "has more than 1 streams", streams=1)


def test_a_picture_that_belongs_to_sound_is_no_frame(tmp_path):
    put(tmp_path, with_cover(), "a.m4a")
    refused(tmp_path, "a.m4a", "has no frames: replace it")
    assert len(read_audio(tmp_path, "a.m4a").samples) > 7000


def test_a_duration_that_no_header_states_is_held_to_the_limit(tmp_path):
    put(tmp_path, video(container="mpegts"), "a.ts")
    refused(tmp_path, "a.ts", "lasts 3 s, 2 s are allowed", seconds=2)


def test_frames_that_are_damaged_are_refused(tmp_path):
    whole = video([n / 10 for n in range(9)], "avi", "mpeg4", size=(320, 240), g="9", bf="0")
    damage, said = np.random.default_rng(0), []
    for _ in range(8):
        content = bytearray(whole)
        for at in damage.integers(len(whole) // 4, len(whole) * 3 // 4, 20):
            content[at] ^= 0x55
        put(tmp_path, bytes(content), "a.avi")
        with pytest.raises(DataError, match="'a.avi'") as caught:
            read_video(tmp_path, "a.avi", 9)
        said.append(str(caught.value))
    assert sum("is damaged (its frame at 0." in text for text in said) >= 2  # which FFmpeg mends without an error


def test_a_torn_video_is_refused(tmp_path):
    whole = video([n / 10 for n in range(9)] + [5, 6, 7, 8])
    put(tmp_path, whole[: len(whole) * 9 // 10])
    refused(tmp_path, "a.mkv", "is torn .* of its 8.0 s")


def test_a_frame_that_grows_in_the_middle_is_refused(tmp_path):
    small, large = video(times=[0, 0.1], container="mpegts"), video(times=[2, 2.1], container="mpegts", size=(640, 480))
    put(tmp_path, small + large, "a.ts")
    refused(tmp_path, "a.ts", "no readable video|no frames that can be decoded|pixels", pixels=32 * 24 * 40)


def test_a_codec_that_nobody_knows_is_refused(tmp_path):
    content = video(container="mp4")
    assert content.count(b"avc1") == 2  # the brand, and the description of the stream
    put(tmp_path, content[::-1].replace(b"1cva", b"zzzz", 1)[::-1])
    refused(tmp_path, "a.mkv", "of a codec that is not known")


FILES = [video(), video(container="mp4"), video(container="avi", codec="mpeg4")]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(data.draw(st.sampled_from(FILES)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    put(folder, bytes(content[: data.draw(st.integers(0, len(content)))]))
    found = read_or_refused(lambda: read_video(folder, "a.mkv", 3), DataError)
    assert found is None or len(found.frames) == 3
