"""Sound of every kind comes out as one channel; every trap is a DataError that names the file."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from clips import RATE, adts, sound_file, tone, video, wav
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import read_or_refused

from mitrain.core.errors import DataError, MissingExtraError
from mitrain.data import audio, contents
from mitrain.data.audio import AudioLimits, read_audio


def put(folder: Path, content: bytes, name: str = "a.wav") -> str:
    (folder / name).write_bytes(content)
    return name


def refused(folder: Path, name: str, match: str, **limits) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read_audio(folder, name, AudioLimits(**limits))
    assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "within"),
    [
        ("a.wav", {}, 1e-4),
        ("a.wav", {"subtype": "FLOAT"}, 0),
        ("a.flac", {}, 1e-4),
        ("a.aiff", {}, 1e-4),
        ("a.ogg", {}, 0.05),
        ("a.mp3", {}, 0.05),
    ],
)
def test_what_was_written_is_read(tmp_path, name, options, within):
    sound_file(tmp_path / name, tone(), **options)
    found = read_audio(tmp_path, name)
    assert found.rate == RATE and found.samples.dtype == np.float32 and len(found.samples) == len(tone())
    assert np.abs(found.samples - tone())[400:-400].max() <= within
    assert found.digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_channels_are_averaged(tmp_path):
    both = np.stack([tone(), 0.5 * tone(hertz=100), np.zeros_like(tone())], 1)
    sound_file(tmp_path / "a.wav", both, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path, "a.wav").samples, both.mean(1), atol=1e-7)


def test_long_sound_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK", 999)
    sound_file(tmp_path / "a.wav", tone(), subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path, "a.wav").samples, tone())


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000])
def test_resampling_keeps_the_sound(tmp_path, rate):
    sound_file(tmp_path / "a.wav", tone(rate=rate), rate, subtype="FLOAT")
    found = read_audio(tmp_path, "a.wav")
    assert found.rate == rate and found.at(rate) is found.samples
    resampled = found.at(RATE)
    assert resampled.dtype == np.float32 and abs(len(resampled) - len(tone())) <= 1
    assert np.abs(resampled[:7900] - tone()[:7900])[200:].max() < 1e-3


def test_the_file_is_read_once(tmp_path, monkeypatch):
    opened = []
    sound_file(tmp_path / "a.wav", tone())
    read = contents.read_whole
    monkeypatch.setattr(contents, "read_whole", lambda path, *rest: opened.append(path) or read(path, *rest))
    read_audio(tmp_path, "a.wav")
    assert len(opened) == 1


@pytest.mark.parametrize(("container", "within"), [("matroska", 1e-4), ("mp4", 0.05)])
def test_the_sound_of_a_video_is_read(tmp_path, container, within):
    name = put(tmp_path, video(container=container, sound=tone(1)), "a.video")
    found = read_audio(tmp_path, name)
    assert found.rate == RATE and abs(len(found.samples) - RATE) <= 2048
    np.testing.assert_allclose(found.samples[2048:14_000], tone(1)[2048:14_000], atol=within)


def test_bad_files_are_one_line(tmp_path):
    put(tmp_path, b"these are words, not sound\n" * 9)
    refused(tmp_path, "a.wav", "is no readable video or sound|is not readable sound")
    put(tmp_path, b"")
    refused(tmp_path, "a.wav", "is not readable sound .it is an empty file")
    put(tmp_path, b"\x89PNG\r\n\x1a\n" + bytes(99))
    refused(tmp_path, "a.wav", "is not readable sound .it is a damaged PNG picture")
    put(tmp_path, wav(b""))
    refused(tmp_path, "a.wav", "has no samples")
    put(tmp_path, wav()[:30])
    refused(tmp_path, "a.wav", "is not readable sound .*'data' chunk")
    put(tmp_path, wav(b"\0\0" * 2000, channels=1000))
    refused(tmp_path, "a.wav", "has 1000 channels, 32 are allowed")
    put(tmp_path, wav(rate=1_000_000_000))
    refused(tmp_path, "a.wav", "has 1000000000 samples per second, 1000 to 384000 are allowed")
    put(tmp_path, wav(rate=7))
    refused(tmp_path, "a.wav", "has 7 samples per second")
    refused(tmp_path, "none.wav", "no sound 'none.wav'")
    refused(tmp_path, "../a.wav", "leads out of the data folder")


def test_what_is_torn_is_refused_and_what_was_written_to_a_pipe_is_not(tmp_path):
    put(tmp_path, wav(promised=1_000_000))
    refused(tmp_path, "a.wav", "is torn .3200 of its 1000000 bytes")
    for unknown in (0xFFFFFFFF, 0x7FFFF000):
        put(tmp_path, wav(promised=unknown))
        assert len(read_audio(tmp_path, "a.wav").samples) == 1600
    for kind in ("a.flac", "a.ogg", "a.mp3", "a.aiff", "a.caf"):
        sound_file(tmp_path / kind, tone(2))
        whole = (tmp_path / kind).read_bytes()
        put(tmp_path, whole[: len(whole) // 2], kind)
        refused(tmp_path, kind, "torn|not readable sound")
    whole = video(container="mp4", sound=tone(1), movflags="faststart")
    put(tmp_path, whole[: len(whole) // 2], "a.mp4")
    refused(tmp_path, "a.mp4", "no readable video or sound|torn")


def test_sound_of_a_codec_that_nobody_knows_is_refused(tmp_path):
    content = video(container="mp4", sound=tone(1))
    assert content.count(b"mp4a") == 1
    put(tmp_path, content.replace(b"mp4a", b"zzzz").replace(b"esds", b"free"), "a.mp4")
    refused(tmp_path, "a.mp4", "has sound of a codec that is not known")


def test_ten_hours_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    head = wav(b"", rate=1000, promised=36_000 * 1000 * 2)
    put(tmp_path, head)
    os.truncate(tmp_path / "a.wav", len(head) + 36_000 * 1000 * 2)  # sparse
    refused(tmp_path, "a.wav", "lasts 36000 s, 600 s are allowed")


@pytest.mark.parametrize("silence_first", [False, True])
def test_an_mp3_without_a_header_is_read_to_its_end(tmp_path, silence_first):
    noise = (0.3 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
    parts = [np.zeros(4 * RATE, np.float32), noise]
    samples = np.concatenate(parts if silence_first else parts[::-1])
    sound_file(tmp_path / "a.mp3", samples, bitrate_mode="VARIABLE")
    whole = (tmp_path / "a.mp3").read_bytes()
    bare = whole[whole.index(whole[:2], 4) :]  # without its first frame, which says how long it is
    put(tmp_path, b"ID3\3\0\0\0\0\0\x20" + b"Information on it".ljust(32, b"\0") + bare, "a.mp3")
    assert abs(soundfile.info(tmp_path / "a.mp3").frames - len(samples)) > RATE  # what libsndfile guesses
    assert abs(len(read_audio(tmp_path, "a.mp3").samples) - len(samples)) < 2400
    refused(tmp_path, "a.mp3", "lasts 5 s, 4.5 s are allowed", seconds=4.5)


def test_samples_that_are_not_finite_are_refused(tmp_path):
    samples = tone()
    samples[1600] = np.nan
    sound_file(tmp_path / "a.wav", samples, subtype="FLOAT")
    refused(tmp_path, "a.wav", "not finite .0.100 s from its start")


def test_a_rate_that_changes_in_the_middle_is_refused(tmp_path):
    put(tmp_path, adts(RATE), "a.aac")
    assert abs(len(read_audio(tmp_path, "a.aac").samples) - RATE) <= 2048
    put(tmp_path, adts(RATE) + adts(48_000), "a.aac")
    refused(tmp_path, "a.aac", "changes its sample rate or channels in the middle")


def test_formats_that_are_only_guessed_are_refused(tmp_path):
    out = io.BytesIO()
    soundfile.write(out, tone(), RATE, format="HTK", subtype="PCM_16")
    put(tmp_path, out.getvalue(), "a.htk")
    refused(tmp_path, "a.htk", "is a file of HTK")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    name = put(tmp_path, video(sound=tone()), "a.mkv")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"reading video needs the package 'av' .*mitrain\[video\]"):
        read_audio(tmp_path, name)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(MissingExtraError, match=r"reading sound needs the package 'soundfile' .*mitrain\[audio\]"):
        read_audio(tmp_path, name)


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, tone(0.2), RATE, format=kind)
    return out.getvalue()


FILES = [encoded("WAV"), encoded("FLAC"), encoded("OGG"), video(sound=tone(0.2))]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(data.draw(st.sampled_from(FILES)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    put(folder, bytes(content[: data.draw(st.integers(0, len(content)))]))
    found = read_or_refused(lambda: read_audio(folder, "a.wav"), DataError)
    assert found is None or np.isfinite(found.samples).all()
