"""Sounds: the samples of anything libsndfile reads (WAV, FLAC, Ogg, MP3)."""

import io
from dataclasses import dataclass

import numpy as np
import soundfile
from numpy.typing import NDArray

from mera_ds.media.errors import Unusable
from mera_ds.media.lengths import require_whole

MAX_AUDIO_SECONDS = 60
"""What follows is not read."""
MAX_FILE_SECONDS = 3600
"""A file that is longer by its header is no clip, and refused."""
MAX_AUDIO_VALUES = 64_000_000
"""Samples of all channels that are read at once: 256 MB."""


@dataclass(frozen=True)
class Audio:
    """A decoded sound."""

    waveform: NDArray[np.float32]
    """Samples (channels, n), nominally in [-1, 1]."""
    rate: int
    """Samples per second."""


def decode_audio(content: bytes, extension: str) -> Audio:
    """Return up to `MAX_AUDIO_SECONDS` of a sound; the extension isn't used."""
    require_whole(content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            wanted = _wanted_frames(file)
            samples = file.read(wanted, dtype="float32", always_2d=True)
            rate = file.samplerate
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise Unusable(f"{type(error).__name__}: {error}") from None
    if not len(samples):
        raise Unusable("it has no samples")
    if not np.isfinite(samples).all():
        raise Unusable("it has samples that are not finite")
    return Audio(np.ascontiguousarray(samples.T), rate)


def _wanted_frames(file: soundfile.SoundFile) -> int:
    """Return how many frames to read, from the header alone."""
    rate, channels, frames = file.samplerate, file.channels, file.frames
    if frames > MAX_FILE_SECONDS * rate:
        raise Unusable(
            f"it lasts {frames / rate / 3600:.1f} hours by its header, more than "
            f"{MAX_FILE_SECONDS // 3600}; cut it into clips"
        )
    wanted = min(frames, rate * MAX_AUDIO_SECONDS) if frames >= 0 else rate * MAX_AUDIO_SECONDS
    if wanted * channels > MAX_AUDIO_VALUES:
        raise Unusable(
            f"{channels} channels at {rate} Hz are {wanted * channels} values, more than "
            f"{MAX_AUDIO_VALUES}"
        )
    return wanted
