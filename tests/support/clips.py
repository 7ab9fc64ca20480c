"""Small files of sound and video, made here."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

RATE = 16_000
TICKS = 1000  # a second, of the videos made here


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440) -> np.ndarray:
    """(n,) float32."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def wav(body: bytes = bytes(3200), rate: int = RATE, channels: int = 1, promised: int | None = None) -> bytes:
    """A WAV file of 16 bits whose header says what it is told to."""
    size = len(body) if promised is None else promised
    frame = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * frame % 2**32, frame % 2**16, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", (36 + size) % 2**32) + head + body


def sound_file(path: Path, samples: np.ndarray, rate: int = RATE, **options: str) -> str:
    """Writes (n,) or (n, channels); returns the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path.name


def grey(number: int, size: tuple[int, int] = (32, 24)) -> np.ndarray:
    """The frame with that number: (height, width, 3) uint8, of one brightness, its left half a little darker."""
    picture = np.full((size[1], size[0], 3), 40 + 20 * (number % 10), np.uint8)
    picture[:, : size[0] // 2] -= 30
    return picture


def video(
    times: Sequence[float] = (0, 0.1, 0.2, 1.5, 1.6, 3.0),
    container: str = "matroska",
    codec: str = "libx264",
    size: tuple[int, int] = (32, 24),
    sound: np.ndarray | None = None,
    rate: int = 30,
    **options: str,
) -> bytes:
    """A video whose frame ``number`` (see `grey`) is shown from ``times[number]`` on, in seconds; with ``sound`` or none.

    ``rate``: what the stream says of itself, in frames per second; the last frame is shown for one of these.
    """
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        if times:
            stream = file.add_stream(codec, rate=rate, options=options)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = Fraction(1, TICKS)
        if sound is not None:
            heard = file.add_stream("aac" if container == "mp4" else "flac", rate=RATE, layout="mono")
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(grey(number, size), format="rgb24")
            frame.pts, frame.time_base = round(time * TICKS), Fraction(1, TICKS)
            file.mux(stream.encode(frame))
        if times:
            file.mux(stream.encode())
        if sound is not None:
            add_sound(file, heard, sound)
    return out.getvalue()


def add_sound(file: av.container.OutputContainer, stream: av.AudioStream, samples: np.ndarray, rate: int = RATE) -> None:
    whole = (samples * 32767).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(whole[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    for packet in (*stream.encode(frame), *stream.encode()):
        file.mux(packet)


def with_cover() -> bytes:
    """Sound with a picture of its own, as music files have."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        heard, cover = file.add_stream("aac", rate=RATE, layout="mono"), file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = (
            32,
            24,
            "yuvj420p",
            av.stream.Disposition.attached_pic,
        )
        picture = av.VideoFrame.from_ndarray(grey(0), format="rgb24")
        picture.pts = 0
        file.mux(cover.encode(picture))
        add_sound(file, heard, tone())
        file.mux(cover.encode())
    return out.getvalue()


def adts(rate: int) -> bytes:
    """A second of AAC in a stream without a container's header."""
    out = io.BytesIO()
    with av.open(out, "w", format="adts") as file:
        add_sound(file, file.add_stream("aac", rate=rate, layout="mono"), tone(1, rate), rate)
    return out.getvalue()
