"""Videos: frames of animated pictures and of video files, all or evenly chosen ones.

Video files are decoded from the start, since most hold few key frames and seeking is exact in
none of the usual containers; only chosen frames become pixels. Where every packet is a key frame
(Motion JPEG), only chosen packets are decoded.
"""

import io
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from mera_ds.media.errors import Unusable
from mera_ds.media.image import on_white, open_image, pillow_errors, require_image_size
from mera_ds.media.lengths import require_whole

MAX_CLIP_PIXELS = 128_000_000
"""All frames of a clip together: 384 MB. Of a longer clip, evenly spaced frames are kept."""
MAX_VIDEO_FRAMES = 200_000
"""Two hours at 25 frames a second; a longer video is refused by its header or packet list."""

ANIMATION_EXTENSIONS = ("webp", "gif", "png")
VIDEO_CONTAINERS = {"mp4": "mp4", "mov": "mov", "avi": "avi", "mkv": "matroska", "webm": "matroska"}
"""The demuxer is named, never guessed: a guessed one might be a playlist that opens other files."""

Frame = NDArray[np.uint8]


def decode_video(content: bytes, extension: str) -> Frame:
    """Return the frames of a clip (F, H, W, 3), evenly thinned to `MAX_CLIP_PIXELS`."""
    return sample_frames(content, extension, None)


def sample_frames(content: bytes, extension: str, wanted: int | None) -> Frame:
    """Return `wanted` frames (F, H, W, 3), evenly from the first to the last one.

    The positions are those of `linspace(0, count - 1, wanted)`, rounded down. A shorter clip, or
    `wanted` None, gives all its frames.

    Raises:
        Unusable: the clip is damaged, empty, too large or of an unknown type.
    """
    if extension in ANIMATION_EXTENSIONS:
        with pillow_errors():
            return _animation_frames(content, wanted)
    if extension not in VIDEO_CONTAINERS:
        known = ", ".join((*ANIMATION_EXTENSIONS, *VIDEO_CONTAINERS))
        raise Unusable(f"files of type '{extension}' are not read as video; known: {known}")
    require_whole(content)
    try:
        return _container_frames(content, VIDEO_CONTAINERS[extension], wanted)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise Unusable(f"{type(error).__name__}: {error}") from None


def video_codec(content: bytes, extension: str) -> str | None:
    """Return the name of a video file's codec (`h264`, `mpeg4`, …), or None if it isn't known."""
    if extension not in VIDEO_CONTAINERS:
        return None
    try:
        with _open(content, VIDEO_CONTAINERS[extension]) as source:
            context = source.streams.video[0].codec_context
            return None if context is None else str(context.name)
    except (av.FFmpegError, ValueError, IndexError):
        return None


def _animation_frames(content: bytes, wanted: int | None) -> Frame:
    image = open_image(content)
    count = getattr(image, "n_frames", 1)
    _require_count(count)
    chosen = _kept_frames(count, image.width * image.height, wanted)

    def frames() -> Iterator[Frame]:
        for index in chosen:
            image.seek(index)
            yield np.asarray(on_white(image))

    return _stack(frames(), len(chosen))


def _container_frames(content: bytes, container: str, wanted: int | None) -> Frame:
    with _open(content, container) as source:
        stream = source.streams.video[0]
        if stream.codec_context is None:
            raise Unusable("no decoder knows its codec")
        width, height = stream.codec_context.width, stream.codec_context.height
        require_image_size(width, height)
        _require_count(stream.frames)
        keys = _key_packets(source)
    count = len(keys)
    chosen = _kept_frames(count, width * height, wanted)
    if all(keys):
        clip = _decode_packets(content, container, set(chosen))
        if len(clip) == len(chosen):
            return _stack(clip, len(chosen))
    decoded, clip = _decode_in_order(content, container, set(chosen))
    if decoded != count and 2 * decoded >= count:
        # Some packets gave no frame: spread over those that did.
        chosen = _kept_frames(decoded, width * height, wanted)
        _, clip = _decode_in_order(content, container, set(chosen))
    return _stack(clip, len(chosen))


def _open(content: bytes, container: str) -> InputContainer:
    source = av.open(io.BytesIO(content), "r", format=container)
    if not source.streams.video:
        source.close()
        raise Unusable("it has no video stream")
    return source


def _key_packets(source: InputContainer) -> list[bool]:
    """Return for each packet of the video whether it is a key frame; nothing is decoded."""
    keys: list[bool] = []
    for packet in source.demux(video=0):
        if packet.size > 0:
            keys.append(packet.is_keyframe)
            _require_count(len(keys))
    return keys


def _decode_packets(content: bytes, container: str, chosen: set[int]) -> list[Frame]:
    """Decode only the chosen packets, each of which is a key frame."""
    clip = []
    with _open(content, container) as source:
        context = source.streams.video[0].codec_context
        packets = (packet for packet in source.demux(video=0) if packet.size > 0)
        for number, packet in enumerate(packets):
            if number in chosen:
                clip += [_pixels(frame) for frame in context.decode(packet)]
        clip += [_pixels(frame) for frame in context.decode(None)]
    return clip


def _decode_in_order(content: bytes, container: str, chosen: set[int]) -> tuple[int, list[Frame]]:
    """Decode everything; return how many frames there are, and the chosen ones' pixels."""
    count, clip = 0, []
    with _open(content, container) as source:
        for frame in source.decode(video=0):
            if count in chosen:
                clip.append(_pixels(frame))
            count += 1
    return count, clip


def _pixels(frame: VideoFrame) -> Frame:
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def _require_count(count: int) -> None:
    if count > MAX_VIDEO_FRAMES:
        raise Unusable(f"it has {count} frames or more, more than {MAX_VIDEO_FRAMES}")


def _kept_frames(count: int, pixels: int, wanted: int | None) -> list[int]:
    """Return the indices of the frames to keep, as many as `MAX_CLIP_PIXELS` allows."""
    kept = min(count, max(MAX_CLIP_PIXELS // max(pixels, 1), 1))
    if wanted is not None:
        kept = min(kept, wanted)
    return sorted({int(index) for index in np.linspace(0, count - 1, kept)})


def _stack(frames: Iterable[Frame], expected: int) -> Frame:
    clip: Sequence[Frame] = list(frames)
    if not clip:
        raise Unusable("it has no frames")
    if len(clip) < expected // 2:
        raise Unusable(f"only {len(clip)} of {expected} frames can be decoded")
    if any(frame.shape != clip[0].shape for frame in clip):
        raise Unusable("its frames differ in size")
    return np.stack(clip)
