"""Shows what shard folders hold: a few lines of text, or one HTML page with the media in it."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mera_ds.errors import DataError
from mera_ds.files import write_bytes
from mera_ds.media.errors import Unusable
from mera_ds.media.video import VIDEO_CONTAINERS, sample_frames, video_codec
from mera_ds.media.webp import encode_frames
from mera_ds.shards.format import ShardIndex, Text
from mera_ds.shards.reader import ShardReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGE_TYPES = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "gif": "gif", "webp": "webp"}
AUDIO_TYPES = {"wav": "wav", "flac": "flac", "mp3": "mpeg", "ogg": "ogg"}
VIDEO_TYPES = {"mp4": "mp4", "webm": "webm"}
PLAYED_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d")
"""Codecs that the usual browsers play (hevc: some of them)."""
FRAMES = 4
"""Of other videos so many frames are shown, as a moving picture."""
MAX_POINTS = 2048
"""A larger point cloud, or a longer series, is thinned out for the page."""
MAX_CURVES = 16


def preview(folder: Path, count: int) -> str:
    """Return a text that describes a shard folder and `count` of its samples.

    Raises:
        InputError: the folder is no complete shard folder.
        DataError: one of the shown samples is damaged.
    """
    with ShardReader(folder) as reader:
        lines = [_title(reader.index), *_facts(reader.index)]
        for position in _spread(reader.index, count):
            sample = reader.samples[position]
            medium = f"{sample.extension}, {sample.media_size} bytes"
            lines.append(f"  {sample.key}  [{sample.concept}]  {medium}")
            lines += [f"      {_text_line(text)}" for text in reader.read_texts(position)]
    return "\n".join(lines)


def write_html(folders: Sequence[Path], out: Path, count: int) -> None:
    """Write one self-contained page with `count` samples of each folder: media and texts.

    Pictures, sounds and videos are played by the browser, `npy` point clouds are drawn and can
    be turned with the mouse or the arrow keys; other `npy` media are drawn as curves.

    Raises:
        InputError: one of the folders is no complete shard folder.
        DataError: one of the shown samples is damaged.
    """
    sections = "\n".join(_section(folder, count) for folder in folders)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Shard preview</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Shard preview</h1>
{sections}
<script>{SCRIPT}</script>
</body>
</html>
"""
    write_bytes(out, page.encode())


def _title(index: ShardIndex) -> str:
    size = sum(shard.bytes for shard in index.shards)
    counts = index.usable_counts
    return (
        f"{index.dataset}/{index.split}: {counts['samples']} {index.modality} media, "
        f"{counts['caption']} captions, {counts['qa']} questions, "
        f"tars: {len(index.shards)} ({size / 1e6:.1f} MB)"
    )


def _facts(index: ShardIndex) -> list[str]:
    closed = index.choices["qa"]
    lost = len(index.samples) - len(index.usable)
    left_out = [f"  in quarantine: {lost} media"] if lost else []
    return [
        f"  licence: {index.licence}",
        f"  recipe: {json.dumps(index.recipe, ensure_ascii=False)}",
        f"  answers: {'free' if closed is None else ', '.join(closed)}",
        f"  fingerprint: {index.fingerprint}",
        *left_out,
    ]


def _text_line(text: Text) -> str:
    answers = " | ".join(text.answers)
    return f"{text.id}: {text.question} -> {answers}" if text.question else f"{text.id}: {answers}"


def _spread(index: ShardIndex, count: int) -> list[int]:
    """Return up to `count` usable positions, evenly spread and starting with the first."""
    usable = index.usable.tolist()
    shown = max(0, min(len(usable), count))
    return [usable[number * len(usable) // shown] for number in range(shown)]


def _section(folder: Path, count: int) -> str:
    with ShardReader(folder) as reader:
        facts = "".join(f"<li>{html.escape(line.strip())}</li>" for line in _facts(reader.index))
        cards = "\n".join(_card(reader, number) for number in _spread(reader.index, count))
        title = html.escape(_title(reader.index))
    return f"""<section>
<h2>{title}</h2>
<ul class="facts">{facts}</ul>
<div class="cards">
{cards}
</div>
</section>"""


def _card(reader: ShardReader, position: int) -> str:
    sample = reader.samples[position]
    texts = reader.read_texts(position)
    label = html.escape(next((t.answers[0] for t in texts if t.answers), sample.concept))
    medium = medium_html(reader, position, label)
    rows = "".join(_text_row(text) for text in texts)
    names = html.escape(" · ".join(dict.fromkeys((sample.key, sample.concept))))
    return f'<article>{medium}<p class="key">{names}</p><dl>{rows}</dl></article>'


def _text_row(text: Text) -> str:
    question = html.escape(text.question or text.task)
    answers = html.escape(" | ".join(text.answers))
    return f"<dt>{question}</dt><dd>{answers}</dd>"


def medium_html(reader: ShardReader, position: int, label: str) -> str:
    """Return a medium as HTML that needs no other file; `label` (escaped) says what it is.

    A point cloud is a canvas that `SCRIPT` draws; `STYLE` gives all kinds one height.

    Raises:
        DataError: the sample is damaged.
    """
    sample = reader.samples[position]
    name = f"{reader.folder}: {sample.key}.{sample.extension}"
    content = reader.read_media(position)
    if sample.extension == "npy" and reader.index.modality != "pointcloud":
        return _curves(content, label, name)
    return _medium(sample.extension, content, label, name)


def _medium(extension: str, content: bytes, label: str, name: str) -> str:
    if extension in IMAGE_TYPES:
        return _picture(IMAGE_TYPES[extension], content, label)
    if extension in AUDIO_TYPES:
        url = _data_url(f"audio/{AUDIO_TYPES[extension]}", content)
        return f'<audio controls src="{url}" aria-label="{label}"></audio>'
    if extension in VIDEO_CONTAINERS:
        return _video(extension, content, label)
    if extension == "npy":
        points = json.dumps(_points(content, name), separators=(",", ":"))
        return (
            f'<canvas width="320" height="320" tabindex="0" role="img" aria-label="{label}" '
            f'data-points="{points}"></canvas>'
        )
    return f'<p class="none">{html.escape(extension)}, {len(content)} bytes (no preview)</p>'


def _picture(kind: str, content: bytes, label: str) -> str:
    return f'<img src="{_data_url(f"image/{kind}", content)}" alt="{label}">'


def _video(extension: str, content: bytes, label: str) -> str:
    """Return a player, or a few frames where browsers don't play such a file."""
    codec = video_codec(content, extension)
    if extension in VIDEO_TYPES and codec in PLAYED_CODECS:
        url = _data_url(f"video/{VIDEO_TYPES[extension]}", content)
        return f'<video controls loop muted src="{url}" aria-label="{label}"></video>'
    what = f"{extension} video, {codec or 'unknown codec'}"
    try:
        frames = sample_frames(content, extension, FRAMES)
        picture = _picture("webp", encode_frames(frames), label)
    except (Unusable, ValueError) as error:
        return f'<p class="none">{html.escape(f"{what}: not playable ({error})")}</p>'
    note = f"{what}: browsers don't play it; shown as {len(frames)} frames"
    return f'{picture}<p class="none">{html.escape(note)}</p>'


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _read_npy(content: bytes, name: str) -> "NDArray[Any]":
    import numpy as np

    try:
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{name} is no readable npy file ({error}); rebuild the folder") from None
    return array


def _curves(content: bytes, label: str, name: str) -> str:
    """Return a drawing of a series (T,) or (T, channels); of anything else, its shape."""
    array = _read_npy(content, name)
    series = array[:, None] if array.ndim == 1 else array
    if series.ndim != 2 or not 0 < series.shape[1] <= MAX_CURVES or series.dtype.kind not in "fiu":
        shape = html.escape(f"npy, {array.dtype} {array.shape}")
        return f'<p class="none">{shape} (no preview)</p>'
    shown = series[:: -(-len(series) // MAX_POINTS) or 1].astype(float)
    span = float(shown.max(initial=0.0) - shown.min(initial=0.0)) or 1.0
    across = 320 / max(len(shown) - 1, 1)
    lines = []
    for number, channel in enumerate((158 - 156 * (shown - shown.min(initial=0.0)) / span).T):
        points = " ".join(f"{across * step:.1f},{up:.1f}" for step, up in enumerate(channel))
        colour = f"hsl({360 * number // series.shape[1]} 70% 50%)"
        lines.append(f'<polyline fill="none" stroke="{colour}" points="{points}"></polyline>')
    return f'<svg viewBox="0 0 320 160" role="img" aria-label="{label}">{"".join(lines)}</svg>'


def _points(content: bytes, name: str) -> list[list[float]]:
    """Return x, y, z in -1 .. 1 (and r, g, b in 0 .. 1) of a point cloud's points."""
    import numpy as np

    points = _read_npy(content, name)
    if points.ndim != 2 or points.shape[1] not in (3, 6) or not len(points):
        raise DataError(f"{name} has the shape {points.shape}, expected (points, 3 or 6)")
    if points.dtype.kind not in "fiu" or not np.isfinite(points).all():
        raise DataError(f"{name} holds something else than finite numbers")
    points = points[:: -(-len(points) // MAX_POINTS)].astype(np.float64)
    centred = points[:, :3] - points[:, :3].mean(axis=0)
    scale = float(np.linalg.norm(centred, axis=1).max()) or 1.0
    shown: list[list[float]] = np.hstack([centred / scale, points[:, 3:]]).round(3).tolist()
    return shown


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem;
  max-width: 75rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .3rem; }
.facts { color: var(--soft); font-size: .8rem; list-style: none; margin: 0 0 1rem; padding: 0;
  overflow-wrap: anywhere; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
article { border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
img, video, canvas, svg { background: #8881; border-radius: 4px; display: block; height: 10rem;
  image-rendering: pixelated; margin: auto; max-width: 100%; object-fit: contain; }
canvas { aspect-ratio: 1; cursor: grab; touch-action: none; }
audio { width: 100%; }
.key, .none { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
dl { margin: 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0 0 .4rem; }
"""

SCRIPT = """
for (const canvas of document.querySelectorAll("canvas")) {
  const points = JSON.parse(canvas.dataset.points);
  const pen = canvas.getContext("2d");
  let turn = 0.6, tilt = 0.35;
  function draw() {
    const half = canvas.width / 2, cosT = Math.cos(turn), sinT = Math.sin(turn);
    const cosE = Math.cos(tilt), sinE = Math.sin(tilt);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const seen = points.map(([x, y, z, ...rgb]) => {
      const across = x * cosT - y * sinT, away = x * sinT + y * cosT;
      return [across, z * cosE + away * sinE, away * cosE - z * sinE, rgb];
    });
    seen.sort((one, two) => two[2] - one[2]);
    for (const [across, up, away, rgb] of seen) {
      const near = (1 - away) / 2;
      pen.fillStyle = rgb.length
        ? `rgb(${rgb.map((part) => Math.round(255 * part)).join(",")})`
        : `hsl(${215 - 180 * near} 70% 50%)`;
      pen.beginPath();
      pen.arc(half * (1 + 0.9 * across), half * (1 - 0.9 * up), 2 + 3 * near, 0, 7);
      pen.fill();
    }
  }
  function rotate(across, up) {
    turn += across;
    tilt = Math.max(-1.5, Math.min(1.5, tilt + up));
    draw();
  }
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) rotate(event.movementX / 80, event.movementY / 80);
  });
  const steps = { ArrowLeft: [-0.2, 0], ArrowRight: [0.2, 0], ArrowUp: [0, -0.2],
    ArrowDown: [0, 0.2] };
  canvas.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    rotate(...steps[event.key]);
  });
  draw();
}
"""
