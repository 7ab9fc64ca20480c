"""Video from files that others made: some frames of it, taken by their timestamps; every trap a DataError.

Which frame is shown when is read from the packets' timestamps, so that a variable frame rate makes no difference; only what
lies between a wanted frame and the key frame before it is decoded.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mitrain.core.errors import DataError
from mitrain.data.containers import STREAMS, decoded, opened, packets_of
from mitrain.data.contents import read_content
from mitrain.data.images import MAX_PIXELS, Facts

TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class VideoLimits:
    """What a video may have at most: ``pixels`` of a frame, ``seconds``, ``streams`` (of frames, sound, subtitles)."""

    pixels: int = MAX_PIXELS
    seconds: float = 3600
    streams: int = STREAMS

    def admits(self, facts: Facts) -> bool:
        """Whether a file of which that much is known, as of a `Video`, is not too much."""
        pixels, milliseconds = facts.stored_size
        return pixels <= self.pixels and milliseconds <= self.seconds * 1000


@dataclass(frozen=True, kw_only=True)
class Video(Facts):
    """``frames``: RGB pictures, upright, in the order of time; ``times``: when each is first shown, in seconds.

    ``stored_size``: pixels of a frame, and milliseconds from the first to the last that is taken.
    """

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        return 4 * self.stored_size[0] * len(self.frames)


def read_video(root: Path, relative: str, frames: int, limits: VideoLimits | None = None) -> Video:
    """The video ``root/relative`` as what is shown in the middle of each of ``frames`` equal parts of its duration.

    A video of fewer frames gives some of them several times. Raises DataError, naming the file, where the path leads out of
    ``root``, where the file is missing, torn, has no frames or is no video, or where it exceeds ``limits``.
    """
    limits = limits or VideoLimits()
    content, where = read_content(root, relative, "video")
    with opened(content, where, limits.streams) as container:
        # a file of sound may hold its cover as a stream of pictures
        covers = [s for s in container.streams.video if s.disposition.value & type(s.disposition).attached_pic.value]
        stream = next((s for s in container.streams.video if s not in covers), None)
        if stream is None:
            raise DataError(f"{where} has no frames: replace it, or leave it out")
        if (context := stream.codec_context) is None:
            raise DataError(f"{where} is of a codec that is not known: convert it")
        if context.width * context.height > limits.pixels:
            raise DataError(
                f"{where} has frames of {context.width} x {context.height} pixels, {limits.pixels} are allowed:"
                " scale it down"
            )
        context.options = {"max_pixels": str(limits.pixels)}  # the size may change in the middle
        context.thread_count = 1
        packets = packets_of(container, stream, where, limits.seconds)
        shown = pick(context, packets, frames)
        if not shown:
            raise DataError(f"{where} has no frames that can be decoded: replace it, or leave it out")
        times = tuple(float(frame.pts * stream.time_base) for frame in shown)
        images = {id(frame): upright(frame, where) for frame in shown}
    taken = tuple(images[id(frame)] for frame in shown)
    digest = hashlib.sha256(content).hexdigest()
    size = (taken[0].width * taken[0].height, round(1000 * (times[-1] - times[0])))
    return Video(digest=digest, stored_size=size, where=where, frames=taken, times=times)


def pick(context: Any, packets: Sequence[Any], count: int) -> list[Any]:
    """The frames shown in the middle of ``count`` equal parts of the time that ``packets`` last; [] where there is none."""
    length = packets[-1].duration or 0 if packets else 0
    times = sorted({packet.pts for packet in packets if packet.pts is not None})
    if times and all(packet.pts is not None for packet in packets):
        wanted = shown_at(times, length, count)
        found = {frame.pts: frame for frame in decoded(context, needed(packets, set(wanted))) if frame.pts in wanted}
        if found.keys() >= set(wanted):
            return [found[time] for time in wanted]
    # Packets that show nothing, or without times of their own: the frames themselves say when they are shown.
    times = sorted({frame.pts for frame in decoded(context, [packets]) if frame.pts is not None})
    wanted = shown_at(times, length, count)
    found = {frame.pts: frame for frame in decoded(context, [packets]) if frame.pts in wanted}
    return [found[time] for time in wanted]


def shown_at(times: Sequence[int], length: int, count: int) -> list[int]:
    """The times, out of the sorted ``times``, of what is shown in the middle of ``count`` equal parts of them all.

    ``length``: how long the last is shown; 0 where nobody says, as long as the others then.
    """
    if not times:
        return []
    length = length or (times[-1] - times[0]) / max(len(times) - 1, 1)
    span = times[-1] + length - times[0]
    return [times[bisect.bisect_right(times, times[0] + span * (i + 0.5) / count) - 1] for i in range(count)]


def needed(packets: Sequence[Any], wanted: set[int]) -> Iterator[list[Any]]:
    """The runs of packets without gaps from which the frames at the times ``wanted`` can be decoded.

    A frame needs what precedes it in the file from a key frame on that is not shown after it: pictures between that are
    shown before a key frame may refer to what lies before it.
    """
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    feed: set[int] = set()
    for i, packet in enumerate(packets):
        if packet.pts in wanted:
            start = next((k for k in reversed(keys) if k <= i and packets[k].pts <= packet.pts), 0)
            feed.update(range(start, i + 1))
    run: list[Any] = []
    for i in sorted(feed):
        run.append(packets[i])
        if i + 1 not in feed:
            yield run
            run = []


def upright(frame: Any, where: str) -> Image.Image:
    """A frame as RGB, turned as its file says."""
    if frame.is_corrupt:
        raise DataError(f"{where} is damaged (its frame at {frame.time:.2f} s): replace it")
    image, turn = frame.to_image(), round(frame.rotation) % 360
    return image.transpose(TURNS[turn]) if turn in TURNS else image
