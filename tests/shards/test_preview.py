"""The preview shows what the shards hold, in one page that loads nothing from elsewhere."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mera_ds.errors import DataError
from mera_ds.shards.damage import quarantine_folder
from mera_ds.shards.format import Text
from mera_ds.shards.preview import preview, write_html
from mera_ds.shards.writer import RawSample

from .samples import write

VOID = {"meta", "img"}
HOSTILE = '<script>alert("x")</script>'


class _Page(HTMLParser):
    """Collects elements and visible text, and checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def _npy(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def _film(container: str, codec: str) -> bytes:
    """Return twelve frames, each darker than the one before."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as target:
        stream = target.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(12):
            pixels = np.full((32, 32, 3), 200 - 10 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    return buffer.getvalue()


def _write(folder: Path, media: dict[str, bytes], modality: str = "pointcloud") -> None:
    texts = (
        Text("c0", "caption", "", (HOSTILE,)),
        Text("q0", "qa", "a or b?", ("a", "either")),
    )
    samples = [
        RawSample(f"s-{number}-{extension}", extension, content, f"c{number}", "here", texts)
        for number, (extension, content) in enumerate(media.items())
    ]
    write(folder, samples, choices=None, modality=modality)


def test_text_preview(folder: Path) -> None:
    text = preview(folder, 3)
    assert "numbers/train: 12 image media, 12 captions, 12 questions, tars: 6" in text
    assert "answers: even, odd" in text
    assert "CC0-1.0" in text
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  n")]
    assert shown == ["n00", "n04", "n08"]
    assert "q0: even or odd? -> even | who knows" in text


@pytest.mark.parametrize("count", [0, 12, 500])
def test_preview_shows_at_most_all(folder: Path, count: int) -> None:
    lines = preview(folder, count).splitlines()
    assert len([line for line in lines if line.startswith("  n")]) == min(count, 12)


def test_what_is_in_quarantine_is_not_shown(folder: Path, tmp_path: Path) -> None:
    (folder / "00000.tar").unlink()
    quarantine_folder(folder)
    text = preview(folder, 12)
    assert "numbers/train: 10 image media, 10 captions, 10 questions, tars: 6" in text
    assert "in quarantine: 2 media" in text
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  n")]
    assert shown == [f"n{number:02d}" for number in range(2, 12)]
    write_html([folder], tmp_path / "page.html", 12)
    assert len(_Page((tmp_path / "page.html").read_text()).all("article")) == 10


def test_page_holds_media_and_texts(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(5.0, 3.0, (5000, 6))
    media = {
        "png": b"picture",
        "gif": b"moving",
        "wav": b"sound",
        "flac": b"more sound",
        "mp4": _film("mp4", "libx264"),
        "npy": _npy(points),
        "xyz": b"unknown",
    }
    _write(tmp_path / "a", media)
    write_html([tmp_path / "a", tmp_path / "a"], tmp_path / "page.html", 7)
    page = _Page((tmp_path / "page.html").read_text())

    assert len(page.all("section")) == 2
    assert len(page.all("article")) == 14
    embedded = [tag.get("src") for tag in page.all("img") + page.all("audio") + page.all("video")]
    assert len(page.all("img")) == 4
    assert len(page.all("audio")) == 4
    for extension, kind in [("png", "image/png"), ("wav", "audio/wav"), ("mp4", "video/mp4")]:
        content = base64.b64encode(media[extension]).decode()
        assert f"data:{kind};base64,{content}" in embedded
    drawn = np.array(json.loads(page.all("canvas")[0]["data-points"] or ""))
    assert drawn.shape == (1667, 6)
    assert np.abs(drawn[:, :3]).max() <= 1
    assert "xyz, 7 bytes (no preview)" in page.text
    assert "a or b?" in page.text
    assert "a | either" in page.text


@pytest.mark.parametrize(
    ("extension", "codec"), [("avi", "mpeg4"), ("mp4", "mpeg4"), ("mkv", "libx264")]
)
def test_videos_that_browsers_do_not_play_are_shown_as_frames(
    tmp_path: Path, extension: str, codec: str
) -> None:
    container = {"mkv": "matroska"}.get(extension, extension)
    _write(tmp_path / "a", {extension: _film(container, codec)})
    write_html([tmp_path / "a"], tmp_path / "page.html", 1)
    page = _Page((tmp_path / "page.html").read_text())
    assert f"{extension} video, {codec.removeprefix('libx').replace('264', 'h264')}" in page.text
    assert "browsers don't play it; shown as 4 frames" in page.text
    (picture,) = page.all("img")
    kind, _, content = (picture["src"] or "").partition(";base64,")
    assert kind == "data:image/webp"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.n_frames == 4


def test_broken_video_is_said_to_be(tmp_path: Path) -> None:
    _write(tmp_path / "a", {"avi": b"no film"})
    write_html([tmp_path / "a"], tmp_path / "page.html", 1)
    page = _Page((tmp_path / "page.html").read_text())
    assert "avi video, unknown codec: not playable (InvalidDataError" in page.text


def test_texts_cannot_add_code(tmp_path: Path) -> None:
    _write(tmp_path / "a", {"png": b"picture", "wav": b"sound"})
    write_html([tmp_path / "a"], tmp_path / "page.html", 2)
    content = (tmp_path / "page.html").read_text()
    page = _Page(content)
    assert len(page.all("script")) == 1
    assert HOSTILE not in content
    assert page.text.count(HOSTILE) == 2
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a point cloud",
        _npy(np.zeros((4, 2))),
        _npy(np.zeros((0, 3))),
        _npy([[np.nan, 0.0, 0.0]]),
        _npy(np.array([["a", "b", "c"]])),
        _npy(np.zeros((2, 3)))[:-8],
    ],
)
def test_broken_point_cloud_is_named(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path / "a", {"npy": content or b"\0"})
    with pytest.raises(DataError, match=r"s-0-npy\.npy"):
        write_html([tmp_path / "a"], tmp_path / "page.html", 1)
    assert not (tmp_path / "page.html").exists()


def test_series_are_drawn_as_curves(tmp_path: Path) -> None:
    steps = np.linspace(0, 1, 5)
    _write(tmp_path / "a", {"npy": _npy(np.stack([steps, -steps], axis=1))}, "imu")
    write_html([tmp_path / "a"], tmp_path / "page.html", 1)
    rising, falling = _Page((tmp_path / "page.html").read_text()).all("polyline")
    assert rising["points"] == "0.0,80.0 80.0,60.5 160.0,41.0 240.0,21.5 320.0,2.0"
    assert falling["points"] == "0.0,80.0 80.0,99.5 160.0,119.0 240.0,138.5 320.0,158.0"


@pytest.mark.parametrize("array", [np.zeros((2, 3, 4)), np.zeros((5, 40)), np.array(["a", "b"])])
def test_of_other_arrays_the_shape_is_shown(array: np.ndarray, tmp_path: Path) -> None:
    _write(tmp_path / "a", {"npy": _npy(array)}, "imu")
    write_html([tmp_path / "a"], tmp_path / "page.html", 1)
    page = _Page((tmp_path / "page.html").read_text())
    assert f"npy, {array.dtype} {array.shape} (no preview)" in page.text
