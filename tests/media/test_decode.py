"""Decoding of media: right values, and a clear error for everything that is broken."""

import io
import random
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from PIL import Image

from mera_ds.errors import DataError, InputError
from mera_ds.media import decode
from mera_ds.media.audio import MAX_AUDIO_SECONDS

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def image_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animation_bytes(frames: list[Image.Image], kind: str) -> bytes:
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return image_bytes(
        frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **lossless
    )


def solid(colour: tuple[int, ...], size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour)


def container_bytes(container: str, codec: str, frames: int) -> bytes:
    """A clip whose brightness rises by 10 a frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as target:
        stream = target.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for index in range(frames):
            pixels = np.full((16, 32, 3), 20 + 10 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    return buffer.getvalue()


def sound_bytes(samples: NDArray[np.float64], rate: int, kind: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def npy_bytes(array: NDArray[np.generic], allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_image_is_rgb_of_its_own_size(kind: str, extension: str) -> None:
    image = decode("image", extension, image_bytes(solid((200, 100, 50)), kind), "a")
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert np.abs(np.asarray(image)[12, 16].astype(int) - (200, 100, 50)).max() <= 3


def test_transparency_is_laid_on_white() -> None:
    layers = {
        "RGBA": solid((255, 0, 0, 128)),
        "LA": Image.new("LA", (4, 4), (0, 0)),
        "P": Image.new("P", (4, 4), 0),
    }
    pixel = {
        mode: decode("image", "png", image_bytes(layer, "PNG", **options), "a").getpixel((1, 1))
        for (mode, layer), options in zip(
            layers.items(), ({}, {}, {"transparency": 0}), strict=True
        )
    }
    assert pixel == {"RGBA": (255, 127, 127), "LA": (255, 255, 255), "P": (255, 255, 255)}


def test_sixteen_bit_greyscale_keeps_its_gradient() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = decode("image", "png", image_bytes(Image.fromarray(ramp), "PNG"), "a")
    values = np.asarray(image)[..., 0].flatten().astype(int)
    assert values[0] == 0
    assert values[-1] == 255
    assert (np.diff(values) >= 3).all()


@pytest.mark.parametrize(("kind", "extension"), [("WEBP", "webp"), ("GIF", "gif"), ("PNG", "png")])
def test_animation_gives_its_frames_in_order(kind: str, extension: str) -> None:
    frames = [solid(colour) for colour in (RED, GREEN, BLUE)]
    clip = decode("video", extension, animation_bytes(frames, kind), "a")
    assert clip.shape == (3, 24, 32, 3)
    assert clip.dtype == np.uint8
    assert clip.mean((1, 2)).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("container", "extension"), [("mp4", "mp4"), ("avi", "avi")])
def test_video_file_gives_all_frames_in_order(container: str, extension: str) -> None:
    clip = decode("video", extension, container_bytes(container, "mpeg4", 12), "a")
    assert clip.shape == (12, 16, 32, 3)
    brightness = clip.mean((1, 2, 3))
    assert np.abs(brightness - (20 + 10 * np.arange(12))).max() < 6


def test_long_clip_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mera_ds.media.video.MAX_CLIP_PIXELS", 4 * 16 * 32)
    clip = decode("video", "avi", container_bytes("avi", "mpeg4", 10), "a")
    assert np.abs(clip.mean((1, 2, 3)) - (20, 50, 80, 110)).max() < 6


@pytest.mark.parametrize(
    ("kind", "extension", "subtype"),
    [("WAV", "wav", "PCM_16"), ("FLAC", "flac", "PCM_16"), ("OGG", "ogg", "VORBIS")],
)
def test_audio_keeps_channels_and_rate(kind: str, extension: str, subtype: str) -> None:
    time = np.arange(8000) / 16000
    samples = np.stack([np.sin(2 * np.pi * 440 * time), 0.5 * np.cos(2 * np.pi * 220 * time)], 1)
    sound = decode("audio", extension, sound_bytes(0.8 * samples, 16000, kind, subtype), "a")
    assert sound.rate == 16000
    assert sound.waveform.shape == (2, 8000)
    assert sound.waveform.dtype == np.float32
    assert np.abs(sound.waveform - 0.8 * samples.T).max() < 0.1


def test_audio_is_cut_at_the_limit() -> None:
    samples = np.zeros(100 * (MAX_AUDIO_SECONDS + 1))
    sound = decode("audio", "wav", sound_bytes(samples, 100, "WAV", "PCM_16"), "a")
    assert sound.waveform.shape == (1, 100 * MAX_AUDIO_SECONDS)


@pytest.mark.parametrize("columns", [3, 6])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_point_cloud_becomes_float32(columns: int, dtype: type) -> None:
    points = np.arange(4 * columns).reshape(4, columns).astype(dtype)
    cloud = decode("pointcloud", "npy", npy_bytes(points), "a")
    assert cloud.dtype == np.float32
    assert (cloud == points).all()


BROKEN: dict[str, tuple[str, str, Callable[[], bytes], str]] = {
    "image: not an image": ("image", "png", lambda: b"hello", "UnidentifiedImageError"),
    "image: cut off": ("image", "png", lambda: image_bytes(solid(RED), "PNG")[:60], "image"),
    "image: a format that is not read": (
        "image",
        "png",
        lambda: image_bytes(solid(RED), "TIFF"),
        "",
    ),
    "video: no known extension": ("video", "txt", lambda: b"x", "known: webp"),
    "video: a playlist": ("video", "mp4", lambda: b"#EXTM3U\nfile:///etc/hostname\n", ""),
    "video: cut off": ("video", "mp4", lambda: container_bytes("mp4", "mpeg4", 9)[:300], ""),
    "audio: not a sound": ("audio", "wav", lambda: b"RIFFxxxx", "Error"),
    "audio: empty": (
        "audio",
        "wav",
        lambda: sound_bytes(np.zeros(0), 8000, "WAV", "PCM_16"),
        "no samples",
    ),
    "audio: not finite": (
        "audio",
        "wav",
        lambda: sound_bytes(np.full(9, np.nan), 8000, "WAV", "FLOAT"),
        "not finite",
    ),
    "points: pickled": (
        "pointcloud",
        "npy",
        lambda: npy_bytes(np.array([[{}, 1, 2]], dtype=object), allow_pickle=True),
        "",
    ),
    "points: wrong shape": ("pointcloud", "npy", lambda: npy_bytes(np.zeros((4, 5))), "(4, 5)"),
    "points: none": ("pointcloud", "npy", lambda: npy_bytes(np.zeros((0, 3))), "(0, 3)"),
    "points: not finite": (
        "pointcloud",
        "npy",
        lambda: npy_bytes(np.full((2, 3), np.inf)),
        "finite",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_medium_is_named(case: str) -> None:
    kind, extension, content, cause = BROKEN[case]
    with pytest.raises(DataError) as caught:
        decode(kind, extension, content(), "image/apple-1")
    assert str(caught.value).startswith(f"image/apple-1: this {kind} can't be used: ")
    assert cause in str(caught.value)


@pytest.mark.parametrize("side", [9000, 12000, 20000])
def test_image_size_is_checked_before_its_pixels_are_read(side: int) -> None:
    small = image_bytes(solid(RED, (8, 8)), "BMP")
    claims = small[:18] + side.to_bytes(4, "little") * 2 + small[26:]
    with pytest.raises(DataError, match=f"{side} x {side}|{side * side} pixels"):
        decode("image", "bmp", claims, "a")


def test_points_size_is_checked_before_memory_is_taken() -> None:
    content = bytearray(npy_bytes(np.zeros((2, 3))))
    start = content.index(b"(2, 3), }")
    content[start : start + 20] = b"(1000000000000, 3),}"
    with pytest.raises(DataError, match="claims"):
        decode("pointcloud", "npy", bytes(content), "a")


def test_unknown_kind_is_an_input_error() -> None:
    with pytest.raises(InputError, match="did you mean 'image'"):
        decode("imge", "png", b"", "a")


@pytest.mark.parametrize(
    ("kind", "extension", "content"),
    [
        ("image", "png", image_bytes(solid(RED), "PNG")),
        ("image", "jpg", image_bytes(solid(RED), "JPEG")),
        ("video", "gif", animation_bytes([solid(RED), solid(BLUE)], "GIF")),
        ("video", "mp4", container_bytes("mp4", "mpeg4", 4)),
        ("audio", "flac", sound_bytes(np.zeros(500), 8000, "FLAC", "PCM_16")),
        ("pointcloud", "npy", npy_bytes(np.zeros((5, 3)))),
    ],
)
def test_damaged_bytes_give_a_medium_or_a_data_error(
    kind: str, extension: str, content: bytes
) -> None:
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 3, 20))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        if generator.random() < 0.3:
            damaged = damaged[: generator.randrange(len(damaged))]
        try:
            decode(kind, extension, bytes(damaged), "a")
        except DataError:
            refused += 1
    assert refused > 20
