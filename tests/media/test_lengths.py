"""Files that were cut off are refused; decoders alone give a shorter sound or clip in silence."""

import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import pytest
import soundfile

from mera_ds.errors import DataError
from mera_ds.media import decode

FRAMES = 12


def wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(16000) / 5.0) / 2, 16000, format="WAV")
    return buffer.getvalue()


def clip(container: str, codec: str, **options: str) -> Callable[[], bytes]:
    def make() -> bytes:
        noise = np.random.default_rng(0)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clip"
            with av.open(str(path), "w", format=container, options=options) as target:
                stream = target.add_stream(codec, rate=10)
                stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
                for _ in range(FRAMES):
                    pixels = noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                    for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                        target.mux(packet)
                for packet in stream.encode():
                    target.mux(packet)
            return path.read_bytes()

    return make


FILES: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "wav": ("audio", "wav", wav),
    "mp4": ("video", "mp4", clip("mp4", "mpeg4")),
    "mp4 for the web": ("video", "mp4", clip("mp4", "mpeg4", movflags="faststart")),
    "mov": ("video", "mov", clip("mov", "mpeg4")),
    "avi": ("video", "avi", clip("avi", "mpeg4")),
    "mkv": ("video", "mkv", clip("matroska", "mpeg4")),
    "webm": ("video", "webm", clip("webm", "libvpx")),
}


def length(kind: str, extension: str, content: bytes) -> int:
    medium = decode(kind, extension, content, "a")
    return medium.waveform.shape[1] if kind == "audio" else len(medium)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_refused(name: str) -> None:
    kind, extension, make = FILES[name]
    content = make()
    assert length(kind, extension, content) in (16000, FRAMES)
    for share in (0.98, 0.9, 0.5):
        cut = content[: int(share * len(content))]
        with pytest.raises(DataError, match=f"a: this {kind} can't be used: it is cut off: "):
            decode(kind, extension, cut, "a")


@pytest.mark.parametrize("name", FILES)
def test_what_lies_behind_the_end_is_no_matter(name: str) -> None:
    kind, extension, make = FILES[name]
    assert length(kind, extension, make() + bytes(100)) in (16000, FRAMES)


def test_a_sound_whose_writer_did_not_know_its_length() -> None:
    content = bytearray(wav())
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff\xff\xff\xff"
    assert length("audio", "wav", bytes(content)) > 15000


def test_a_clip_whose_writer_did_not_know_its_length() -> None:
    content = clip("webm", "libvpx", live="1")()
    assert length("video", "webm", content) == FRAMES
