"""From a medium's bytes to pixels, samples or points. Broken or outsized media are `DataError`s.

Shards come from anywhere, so nothing here trusts them: sizes are checked before memory is
allocated, formats are fixed by kind, and no pickle is read.
"""

import io
import math
import struct
import tokenize
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from mera_ds.errors import DataError
from mera_ds.registry import DECODER, register
from mera_ds.settings import require_known

MAX_IMAGE_PIXELS = 64_000_000
MAX_CLIP_PIXELS = 128_000_000
"""All frames of a clip together: 384 MB. Of a longer clip, evenly spaced frames are kept."""
MAX_AUDIO_SECONDS = 60
"""What follows is not read."""
MAX_POINTS = 1_000_000

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
ANIMATION_EXTENSIONS = ("webp", "gif", "png")
VIDEO_CONTAINERS = {"mp4": "mp4", "mov": "mov", "avi": "avi", "mkv": "matroska", "webm": "matroska"}
"""The demuxer is named, never guessed: a guessed one might be a playlist that opens other files."""

_BROKEN_IMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow's readers raise on damaged files."""

_BROKEN_NPY = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
"""What numpy's reader raises on damaged files: the header is a Python literal."""


@dataclass(frozen=True)
class Audio:
    """A decoded sound."""

    waveform: NDArray[np.float32]
    """Samples (channels, n), nominally in [-1, 1]."""
    rate: int
    """Samples per second."""


def decode(modality_kind: str, extension: str, content: bytes, name: str) -> Any:
    """Decode one medium.

    Args:
        modality_kind: `image`, `video`, `audio` or `pointcloud`.
        extension: the file's extension without its dot; it decides how a video is read.
        content: the file's bytes.
        name: what messages call the medium, e.g. `image/apple-1`.

    Returns:
        image: an RGB `PIL.Image`, transparency on white; video: uint8 (F, H, W, 3), RGB;
        audio: `Audio`; pointcloud: float32 (N, 3) or (N, 6).

    Raises:
        DataError: on a medium that is damaged, empty or too large, naming it and the cause.
    """
    require_known(modality_kind, DECODERS, f"{name}: modality kind")
    try:
        return DECODERS[modality_kind](content, extension.lower())
    except _Unusable as error:
        raise DataError(f"{name}: this {modality_kind} can't be used: {error}") from None


class _Unusable(Exception):
    """Why a medium can't be used; `decode` adds its name."""


def _decode_image(content: bytes, extension: str) -> Image.Image:
    with _pillow_errors():
        image = _open_image(content)
        return _on_white(image)


def _open_image(content: bytes) -> Image.Image:
    """Open an image; Pillow reads its header only, so the size is known before its pixels are."""
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    _require_image_size(image.width, image.height)
    return image


def _require_image_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise _Unusable(f"it has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS}")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Greyscale of 16 bits or more: Pillow's own conversion clips at 255.
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / max(values.max(), 1) * 255).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white.convert("RGB")


class _pillow_errors(warnings.catch_warnings):
    """Turn what Pillow raises on damaged or outsized images into `_Unusable`."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, _BROKEN_IMAGE):
            raise _Unusable(f"{type(error).__name__}: {error}") from None


def _decode_video(content: bytes, extension: str) -> NDArray[np.uint8]:
    if extension in ANIMATION_EXTENSIONS:
        with _pillow_errors():
            return _decode_animation(content)
    if extension not in VIDEO_CONTAINERS:
        known = ", ".join((*ANIMATION_EXTENSIONS, *VIDEO_CONTAINERS))
        raise _Unusable(f"files of type '{extension}' are not read as video; known: {known}")
    try:
        return _decode_container(content, VIDEO_CONTAINERS[extension])
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise _Unusable(f"{type(error).__name__}: {error}") from None


def _decode_animation(content: bytes) -> NDArray[np.uint8]:
    image = _open_image(content)
    count = getattr(image, "n_frames", 1)
    chosen = _kept_frames(count, image.width * image.height)

    def frames() -> Iterator[NDArray[np.uint8]]:
        for index in chosen:
            image.seek(index)
            yield np.asarray(_on_white(image))

    return _stack(frames(), len(chosen))


def _decode_container(content: bytes, container: str) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(content), "r", format=container) as source:
        if not source.streams.video:
            raise _Unusable("it has no video stream")
        count = sum(1 for packet in source.demux(video=0) if packet.size > 0)
    with av.open(io.BytesIO(content), "r", format=container) as source:
        context = source.streams.video[0].codec_context
        if context is None:
            raise _Unusable("no decoder knows its codec")
        _require_image_size(context.width, context.height)
        chosen = set(_kept_frames(count, context.width * context.height))
        frames = (
            np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
            for index, frame in enumerate(source.decode(video=0))
            if index in chosen
        )
        return _stack(frames, len(chosen))


def _kept_frames(count: int, pixels: int) -> list[int]:
    """Return the indices of all frames, or of as many even ones as `MAX_CLIP_PIXELS` allows."""
    kept = min(count, max(MAX_CLIP_PIXELS // max(pixels, 1), 1))
    return sorted({int(index) for index in np.linspace(0, count - 1, kept)})


def _stack(frames: Iterable[NDArray[np.uint8]], expected: int) -> NDArray[np.uint8]:
    clip = list(frames)
    if not clip:
        raise _Unusable("it has no frames")
    if len(clip) < expected // 2:
        raise _Unusable(f"only {len(clip)} of {expected} frames can be decoded")
    if any(frame.shape != clip[0].shape for frame in clip):
        raise _Unusable("its frames differ in size")
    return np.stack(clip)


def _decode_audio(content: bytes, extension: str) -> Audio:
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            samples = file.read(rate * MAX_AUDIO_SECONDS, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise _Unusable(f"{type(error).__name__}: {error}") from None
    if not len(samples):
        raise _Unusable("it has no samples")
    if not np.isfinite(samples).all():
        raise _Unusable("it has samples that are not finite")
    return Audio(np.ascontiguousarray(samples.T), rate)


def _decode_points(content: bytes, extension: str) -> NDArray[np.float32]:
    try:
        _require_npy_size(content)
        points = np.load(io.BytesIO(content), allow_pickle=False)
        with np.errstate(over="ignore"):  # what overflows becomes infinite, which is refused below
            cloud = np.ascontiguousarray(points, dtype=np.float32)
    except _BROKEN_NPY as error:
        raise _Unusable(f"{type(error).__name__}: {error}") from None
    if cloud.ndim != 2 or cloud.shape[1] not in (3, 6) or not len(cloud):
        raise _Unusable(f"its shape is {points.shape}; expected (N, 3) or (N, 6) with N > 0")
    if len(cloud) > MAX_POINTS:
        raise _Unusable(f"it has {len(cloud)} points, more than {MAX_POINTS}")
    if not np.isfinite(cloud).all():
        raise _Unusable("it has values that are not finite")
    return cloud


def _require_npy_size(content: bytes) -> None:
    """Compare the size that an npy header claims with what is there, before it is allocated."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header: Callable[[io.BytesIO], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version, np.lib.format.read_array_header_2_0)
    shape, _, dtype = read_header(stream)
    claimed, present = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if claimed != present:
        raise _Unusable(f"its header claims {claimed} bytes and {present} are there")


DECODERS: dict[str, Callable[[bytes, str], Any]] = {
    "image": _decode_image,
    "video": _decode_video,
    "audio": _decode_audio,
    "pointcloud": _decode_points,
}


def register_decoder(
    kind: str, extensions: Collection[str], function: Callable[[bytes, str], Any]
) -> None:
    """Add a plugin's kind of media.

    Args:
        kind: what encoders of this kind call their `media`.
        extensions: the files it reads, e.g. `{"npy"}`.
        function: (bytes, extension) -> the decoded medium. Whatever it raises becomes a `DataError`
            that names the sample.

    Raises:
        InputError: if the name is taken.
    """

    def decoder(content: bytes, extension: str) -> Any:
        if extension not in extensions:
            raise _Unusable(
                f"it ends with .{extension}; expected .{', .'.join(sorted(extensions))}"
            )
        try:
            return function(content, extension)
        except Exception as error:
            raise _Unusable(f"{type(error).__name__}: {error}") from error

    register(DECODER, DECODERS, kind, decoder)
