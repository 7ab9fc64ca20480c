"""Sound from files that others made: one channel of float samples, every trap a DataError.

soundfile reads WAV, FLAC, Ogg, MP3 and their kin. PyAV reads what it does not know: the sound of a video, AAC, WMA. What a
header says of channels, sample rate and duration is held to `AudioLimits` before anything is decoded, and the samples are
counted while they are, for a header may say anything. Both packages are optional: the extras [audio] and [video].
"""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mitrain.core.errors import DataError, need_extra
from mitrain.data import containers
from mitrain.data.contents import read_content
from mitrain.data.images import Facts
from mitrain.data.kinds import MEDIA, kind_of

FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "NIST")
"""Those of libsndfile that say in their first bytes what they are. Others are guessed, which noise can pass for."""
BLOCK = 1 << 16  # samples of each channel that are decoded at once
LOWEST_RATE = 1000
UNRECOGNISED = 1  # libsndfile's error for a format that it does not know
TORN = re.compile(r"^ *(?:data|SSND) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
UNKNOWN_LENGTH = 0x7FFF0000  # programs that write to a pipe put this or more in place of the length
START = 1 << 16
MP3_LENGTH = re.compile(rb"(?:Xing|Info)\x00{3}[\x01\x03\x05\x07\x09\x0b\x0d\x0f]|VBRI\x00\x01")
"""Marks of a header that says how many frames an MP3 has. Without one libsndfile guesses, and reads what it guessed."""


@dataclass(frozen=True)
class AudioLimits:
    """What a file of sound may have at most: ``seconds``, ``channels``, samples per second."""

    seconds: float = 600
    channels: int = 32
    rate: int = 384_000

    def check(self, where: str, channels: int, rate: int, samples: float) -> None:
        """DataError where so many ``samples`` of so many ``channels`` are too much, or none."""
        if not 1 <= channels <= self.channels:
            raise DataError(f"{where} has {channels} channels, {self.channels} are allowed: mix them down")
        if not LOWEST_RATE <= rate <= self.rate:
            raise DataError(f"{where} has {rate} samples per second, {LOWEST_RATE} to {self.rate} are allowed: resample it")
        if samples > self.seconds * rate:
            raise DataError(f"{where} lasts {samples / rate:.0f} s, {self.seconds:g} s are allowed: cut it, or leave it out")

    def admits(self, facts: Facts) -> bool:
        """Whether a file of which that much is known, as of a `Sound`, is not too much."""
        samples, rate = facts.stored_size
        return rate <= self.rate and samples <= self.seconds * rate


@dataclass(frozen=True, kw_only=True)
class Sound(Facts):
    """A file's sound: ``samples`` (n,) float32, the mean of its channels, ``rate`` of them per second.

    ``stored_size`` is (n, rate).
    """

    samples: np.ndarray
    rate: int

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes

    def at(self, rate: int) -> np.ndarray:
        """(n',) float32: resampled to ``rate`` samples per second."""
        if rate == self.rate:
            return self.samples
        return need_extra("soxr", "audio", "resampling sound").resample(self.samples, self.rate, rate)


def read_audio(root: Path, relative: str, limits: AudioLimits | None = None) -> Sound:
    """The sound of the file ``root/relative``, which is read once.

    Raises DataError, naming the file, where the path leads out of ``root``, where the file is missing, torn, empty or no
    sound, where its samples are not finite, or where it exceeds ``limits``.
    """
    limits = limits or AudioLimits()
    content, where = read_content(root, relative, "sound")
    samples, rate = decode(content, where, limits)
    if not len(samples):
        raise DataError(f"{where} has no samples: replace it, or leave it out")
    if not np.isfinite(samples).all():
        first = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise DataError(f"{where} has a sample that is not finite ({first / rate:.3f} s from its start): replace it")
    digest, size = hashlib.sha256(content).hexdigest(), (len(samples), rate)
    return Sound(digest=digest, stored_size=size, where=where, samples=samples, rate=rate)


def decode(content: bytes, where: str, limits: AudioLimits) -> tuple[np.ndarray, int]:
    """Samples (n,) float32 of a file's ``content``, and how many are a second."""
    soundfile = need_extra("soundfile", "audio", "reading sound")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.format != "MP3" or MP3_LENGTH.search(content[:START]):
                return decode_known(file, where, limits), file.samplerate
    except soundfile.LibsndfileError as error:
        if error.code != UNRECOGNISED:
            raise unreadable(where, content, error.error_string) from None
        kind = kind_of(content)
        if kind != MEDIA and (kind or not containers.installed()):
            raise unreadable(where, content, "") from None
    return containers.sound_in(content, where, limits)


def unreadable(where: str, content: bytes, reason: str) -> DataError:
    reason = reason.rstrip(".") or f"it is {kind_of(content) or 'of no kind that is known'}"
    return DataError(f"{where} is not readable sound ({reason}): replace it, or convert it to WAV or FLAC")


def decode_known(file: Any, where: str, limits: AudioLimits) -> np.ndarray:
    """Samples (n,) float32 of an open file of soundfile."""
    if file.format not in FORMATS:
        raise DataError(f"{where} is a file of {file.format_info}, if anything: convert it to WAV or FLAC")
    limits.check(where, file.channels, file.samplerate, file.frames)
    for promised, there in TORN.findall(file.extra_info):
        if int(there) < int(promised) < UNKNOWN_LENGTH:
            raise DataError(f"{where} is torn ({there} of its {promised} bytes of sound are there): replace it")
    blocks, count = [np.zeros(0, np.float32)], 0
    block = np.zeros((BLOCK, file.channels), np.float32)
    while length := len(file.read(out=block)):
        count += length
        limits.check(where, file.channels, file.samplerate, count)
        blocks.append(block[:length].mean(1))
    if count < file.frames:
        raise DataError(f"{where} is torn or damaged ({count} of its {file.frames} samples are there): replace it")
    return np.concatenate(blocks)
