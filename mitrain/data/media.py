"""The kinds of files that samples bring: how one is read, and how much of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mitrain.data.arrays import read_array
from mitrain.data.audio import AudioLimits, read_audio
from mitrain.data.images import MAX_PIXELS, Facts, read_image
from mitrain.data.texts import read_text
from mitrain.data.video import VideoLimits, read_video


@dataclass(frozen=True)
class Limits:
    """How large a file may be: ``pixels`` of a picture, and what sound and videos may have."""

    pixels: int = MAX_PIXELS
    audio: AudioLimits = field(default_factory=AudioLimits)
    video: VideoLimits = field(default_factory=VideoLimits)


@dataclass(frozen=True)
class Medium:
    """A kind of file.

    ``read(root, path, limits, …)`` gives its `Facts` with the content, and raises DataError, in a line that names the file,
    for what cannot be read or is too large; ``admits``: whether ``limits`` allow a file of which that much is known.
    """

    name: str
    read: Callable[..., Any]
    admits: Callable[[Facts, Limits], bool] = lambda facts, limits: True


def medium_of(encoder: Any) -> Medium:
    """What an encoder's files are, and how they are read for it (`mitrain.models.Encoder`)."""
    medium, told = MEDIA[encoder.config.takes], getattr(encoder, "reads", {})
    if not told:
        return medium
    name = f"{medium.name} {json.dumps(told, sort_keys=True)}"
    return Medium(name, lambda root, path, limits: medium.read(root, path, limits, **told), medium.admits)


MEDIA: dict[str, Medium] = {
    "image": Medium(
        "image",
        lambda root, path, limits: read_image(root, path, limits.pixels),
        lambda facts, limits: facts.stored_size[0] * facts.stored_size[1] <= limits.pixels,
    ),
    "audio": Medium(
        "audio",
        lambda root, path, limits: read_audio(root, path, limits.audio),
        lambda facts, limits: limits.audio.admits(facts),
    ),
    "video": Medium(
        "video",
        lambda root, path, limits, frames=1: read_video(root, path, frames, limits.video),
        lambda facts, limits: limits.video.admits(facts),
    ),
    "text": Medium("text", lambda root, path, limits: read_text(root, path)),
    "features": Medium("features", lambda root, path, limits, **told: read_array(root, path, **told)),
}
"""By what an encoder takes. The encoder says how many frames are read for it, and which array (``reads``)."""
