"""Odd and hostile media: right pixels, and refusals before memory is taken."""

import io
import struct
import zlib
from collections.abc import Callable

import av
import numpy as np
import psutil
import pytest
import soundfile
from PIL import Image

from mera_ds.errors import DataError
from mera_ds.media import decode
from mera_ds.media.video import MAX_VIDEO_FRAMES, sample_frames, video_codec
from mera_ds.media.webp import encode_frames


def image_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = (255, 0, 0)
    upright[8:, 16:] = (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = image_bytes(
        Image.fromarray(np.ascontiguousarray(stored)), "JPEG", exif=exif, quality=95, subsampling=0
    )
    found = np.asarray(decode("image", "jpg", content, "a")).astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).mean() < 4


def test_cmyk_jpeg() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(decode("image", "jpg", image_bytes(ink, "JPEG", quality=95), "a"))
    assert np.abs(red.astype(int) - (255, 0, 0)).max() < 8
    grey = image_bytes(Image.new("CMYK", (16, 16), (0, 0, 0, 128)), "JPEG", quality=95)
    assert np.abs(np.asarray(decode("image", "jpg", grey, "a")).astype(int) - 127).max() < 4


def test_sixteen_bit_values_keep_their_brightness() -> None:
    dark = image_bytes(Image.fromarray(np.full((4, 4), 257 * 20, np.uint16)), "PNG")
    assert np.asarray(decode("image", "png", dark, "a"))[0, 0].tolist() == [20, 20, 20]


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds a few compressed rows of zeros."""

    def chunk(name: bytes, content: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + end

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(3 * width + 1) * 8)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def hours_of_flac() -> bytes:
    """Return a short FLAC file whose header claims ten hours."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(800), 8000, format="FLAC")
    content = bytearray(buffer.getvalue())
    content[21] &= 0xF0
    content[22:26] = struct.pack(">I", 36000 * 8000)
    return bytes(content)


def many_frames() -> bytes:
    """Return an MP4 whose sample table claims a million frames of equal size."""
    content = bytearray(clip("mp4", "mpeg4", 4))
    place = content.index(b"stsz")
    content[place + 8 : place + 16] = struct.pack(">II", 1, 1_000_000)
    place = content.index(b"stts")
    content[place + 12 : place + 16] = struct.pack(">I", 1_000_000)
    return bytes(content)


def clip(container: str, codec: str, frames: int, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as target:
        stream = target.add_stream(codec, rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(frames):
            pixels = np.full((size, size, 3), 20 + 8 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "extension", "content", "complaint"),
    [
        ("image", "png", lambda: png_header(30_000, 30_000), "pixels"),
        ("image", "png", lambda: png_header(9_000, 9_000), "9000 x 9000 pixels"),
        ("audio", "flac", hours_of_flac, "10.0 hours"),
        ("video", "mp4", many_frames, f"more than {MAX_VIDEO_FRAMES}"),
    ],
)
def test_bombs_are_refused_by_their_header(
    kind: str, extension: str, content: Callable[[], bytes], complaint: str
) -> None:
    bomb = content()
    process = psutil.Process()
    before = process.memory_info().rss
    with pytest.raises(DataError, match=complaint):
        decode(kind, extension, bomb, "bomb")
    assert process.memory_info().rss - before < 50e6


@pytest.mark.parametrize(
    ("container", "codec"), [("avi", "mpeg4"), ("avi", "mjpeg"), ("mp4", "mpeg4")]
)
@pytest.mark.parametrize(
    ("frames", "wanted", "expected"),
    [(12, 4, (0, 3, 7, 11)), (12, 1, (0,)), (3, 4, (0, 1, 2)), (1, 4, (0,)), (5, 5, range(5))],
)
def test_even_frames_of_a_video(
    container: str, codec: str, frames: int, wanted: int, expected: tuple[int, ...]
) -> None:
    found = sample_frames(clip(container, codec, frames), container, wanted)
    assert found.shape == (len(expected), 32, 32, 3)
    assert np.abs(found.mean((1, 2, 3)) - (20 + 8 * np.array(expected))).max() < 4


NOT_CODED = b"\x00\x00\x01\xb6\x51\x9f"
"""An MPEG-4 packet that says "as before"; DivX files hold many, and a decoder gives no frame."""


def test_packets_without_a_frame_do_not_count() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as target:
        stream = target.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        coded = [
            packet
            for index in range(8)
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(
                    np.full((32, 32, 3), 20 + 8 * index, np.uint8), format="rgb24"
                )
            )
        ]
        coded += stream.encode()
        for number, packet in enumerate(coded):
            empty = av.Packet(NOT_CODED)
            empty.stream, empty.time_base = stream, packet.time_base
            packet.pts = packet.dts = 2 * number
            empty.pts = empty.dts = 2 * number + 1
            target.mux(packet)
            target.mux(empty)
    found = sample_frames(buffer.getvalue(), "avi", 4).mean((1, 2, 3))
    assert len(found) == 4
    assert found[0] == pytest.approx(20, abs=4)
    assert found[3] == pytest.approx(76, abs=4)
    assert (np.diff(found) > 8).all()


def test_cut_video_is_refused() -> None:
    content = clip("avi", "mjpeg", 12)
    with pytest.raises(DataError, match="a: this video can't be used: it is cut off: 8983 of"):
        decode("video", "avi", content[: int(len(content) * 0.7)], "a")


def test_codec_is_known_without_decoding() -> None:
    assert video_codec(clip("avi", "mjpeg", 1), "avi") == "mjpeg"
    assert video_codec(clip("mp4", "mpeg4", 1), "mp4") == "mpeg4"
    assert video_codec(b"no video", "mp4") is None


@pytest.mark.parametrize("size", [(1, 8, 6), (4, 7, 5), (3, 1, 1)])
def test_frames_are_stored_without_loss(size: tuple[int, int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    content = encode_frames(frames)
    assert content == encode_frames(frames)
    np.testing.assert_array_equal(decode("video", "webp", content, "a"), frames)


def test_equal_frames_stay_apart() -> None:
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    frames[3] = 200
    np.testing.assert_array_equal(decode("video", "webp", encode_frames(frames), "a"), frames)


@pytest.mark.parametrize("size", [(0, 8, 8, 3), (1, 20_000, 1, 3)])
def test_frames_that_webp_can_not_hold(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="don't fit"):
        encode_frames(np.zeros(size, np.uint8))
