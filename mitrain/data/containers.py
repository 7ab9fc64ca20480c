"""Files of several streams, as videos are, read by PyAV (the extra [video]): their packets, and their sound.

Containers that lead to other files (playlists) are not opened. What FFmpeg raises is a DataError.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from mitrain.core.errors import DataError, need_extra

CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,aac,ac3,amr,mp3"
STATED = ("mov", "matroska", "avi")
"""Containers whose header says how long they last; of others the duration is an estimate."""
MICROSECONDS = 1_000_000  # FFmpeg's unit of a container's duration
SLACK = 1.0  # seconds that a header may promise too much
STREAMS = 16


def installed() -> bool:
    return find_spec("av") is not None


@contextlib.contextmanager
def opened(content: bytes, where: str, streams: int) -> Iterator[Any]:
    """PyAV's container of a file's ``content``, of so many ``streams`` at most; what FFmpeg raises inside is a DataError."""
    av = need_extra("av", "video", "reading video")
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", "max_streams": str(streams + 1)}
    try:
        with av.open(io.BytesIO(content), options=options) as container:
            if len(container.streams) > streams:
                raise DataError(f"{where} has more than {streams} streams: keep those that are used")
            yield container
    except (av.FFmpegError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{where} is no readable video or sound ({reason}): replace it, or convert it") from None


def packets_of(container: Any, stream: Any, where: str, seconds: float) -> list[Any]:
    """The packets of ``stream`` in their order; DataError where the container lasts more than ``seconds``, or is torn."""
    stated = stated_duration(container)
    check_duration(where, stated, seconds)
    packets, first, last = [], None, 0.0
    for packet in container.demux():
        if not packet.size:  # tells a decoder that the stream ends
            continue
        if packet.stream is stream:
            packets.append(packet)
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None:
            begin = float(time * packet.time_base)
            first = begin if first is None else min(first, begin)
            last = max(last, begin + float((packet.duration or 0) * packet.time_base))
            check_duration(where, last - first, seconds)
    lasts = last - (first or 0)
    if lasts < stated - SLACK:
        raise DataError(f"{where} is torn ({lasts:.1f} of its {stated:.1f} s are there): replace it")
    return packets


def stated_duration(container: Any) -> float:
    """How many seconds a container says that it lasts; 0 where that would be an estimate."""
    stated = container.format.name.split(",")[0] in STATED
    return (container.duration or 0) / MICROSECONDS if stated else 0.0


def check_duration(where: str, lasts: float, seconds: float) -> None:
    if lasts > seconds:
        raise DataError(f"{where} lasts {lasts:.0f} s, {seconds:g} s are allowed: cut it, or leave it out")


def decoded(context: Any, runs: Iterable[Sequence[Any]]) -> Iterator[Any]:
    """The frames of each run of packets, decoded from its start."""
    for run in runs:
        for packet in (*run, None):  # None: what the decoder holds back
            yield from context.decode(packet)
        context.flush_buffers()


def sound_in(content: bytes, where: str, limits: Any) -> tuple[np.ndarray, int]:
    """Samples (n,) float32 of the first stream of sound in a file's ``content``, and how many are a second.

    ``limits``: `mitrain.data.audio.AudioLimits`.
    """
    with opened(content, where, STREAMS) as container:
        if not container.streams.audio:
            raise DataError(f"{where} has no sound: replace it, or leave it out")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise DataError(f"{where} has sound of a codec that is not known: convert it")
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        limits.check(where, channels, rate, stated_duration(container) * rate)
        planar = need_extra("av", "video", "reading video").AudioResampler(format="fltp")
        packets = packets_of(container, stream, where, limits.seconds)
        blocks, count = [np.zeros(0, np.float32)], 0
        for frame in decoded(stream.codec_context, [packets]):
            if (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
                raise DataError(f"{where} changes its sample rate or channels in the middle: convert it to WAV or FLAC")
            for part in planar.resample(frame):
                blocks.append(part.to_ndarray().mean(0, dtype=np.float32))
                count += len(blocks[-1])
                limits.check(where, channels, rate, count)
    return np.concatenate(blocks), rate
