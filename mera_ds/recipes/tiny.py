"""Recipe `tiny`: small real media files of four modalities, drawn by code in a second.

For tests and first steps; it needs no source. A modality has 32 concepts, each a pair of an
attribute with eight values and one with four ("red" x "square"), and two media a concept. The
eight test concepts are never trained on, but each of their values is, in other pairs.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image, ImageDraw

from mera_ds.recipes import Log
from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample, write_shards

VERSION = 1
LICENCE = "CC0-1.0"
COPIES = 2
SIZE = 32
FRAMES = 4
POINTS = 128
SECONDS = 0.25

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 180),
    "cyan": (60, 210, 220),
    "pink": (250, 160, 190),
    "white": (250, 250, 250),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PITCHES = ("c", "d", "e", "f", "g", "a", "b", "high c")
SEMITONES = (0, 2, 4, 5, 7, 9, 11, 12)
MIDDLE_C = 261.63
STRETCHES = {
    "plain": (1.0, 1.0, 1.0),
    "flat": (1.0, 1.0, 0.35),
    "tall": (1.0, 1.0, 2.2),
    "long": (2.2, 1.0, 1.0),
}

Floats = npt.NDArray[np.float64]
Drawer = Callable[[str, str, int, np.random.Generator], tuple[str, bytes]]


@dataclass(frozen=True)
class _Topic:
    """One modality: its two attributes, its texts, and what draws a medium."""

    modality: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    caption: str
    question: str
    asked: int
    """Which attribute the question is about: 0 or 1."""
    draw: Drawer
    """(first value, second value, copy, randomness) -> file extension, file content."""


def build(source: Path | None, out: Path, log: Log, seed: int = 0) -> list[Path]:
    """Write the eight shard folders `<out>/<modality>/{train,test}`; `source` isn't read.

    The same seed and library versions give the same bytes.
    """
    folders = []
    for number, topic in enumerate(TOPICS):
        splits: dict[str, list[RawSample]] = {"train": [], "test": []}
        for a, first in enumerate(topic.first):
            for b, second in enumerate(topic.second):
                split = "test" if (a + b) % len(topic.second) == 0 else "train"
                for copy in range(COPIES):
                    random = np.random.default_rng((seed, number, a, b, copy))
                    splits[split].append(_sample(topic, first, second, copy, random))
        for split, samples in splits.items():
            folder = out / topic.modality / split
            index = write_shards(
                folder,
                topic.modality,
                split,
                topic.modality,
                samples,
                LICENCE,
                {"name": "tiny", "version": VERSION, "seed": seed, "filters": [], "sources": {}},
                {"qa": (topic.first, topic.second)[topic.asked]},
            )
            log(f"{folder}: {index.counts['samples']} media, {index.counts['texts']} texts")
            folders.append(folder)
    return folders


def _sample(
    topic: _Topic, first: str, second: str, copy: int, random: np.random.Generator
) -> RawSample:
    extension, media = topic.draw(first, second, copy, random)
    concept = f"{first} {second}"
    return RawSample(
        key=f"{topic.modality}-{concept.replace(' ', '-')}-{copy}",
        extension=extension,
        media=media,
        concept=concept,
        source=f"drawn: {topic.modality}, {concept}, copy {copy}",
        texts=(
            Text("c0", "caption", "", (topic.caption.format(first=first, second=second),)),
            Text("q0", "qa", topic.question, ((first, second)[topic.asked],)),
        ),
    )


def _draw_image(
    colour: str, shape: str, copy: int, random: np.random.Generator
) -> tuple[str, bytes]:
    """A PNG of one shape, at a random place and size, on dark grey."""
    image = _background(random)
    draw = ImageDraw.Draw(image)
    radius = int(random.integers(7, 11))
    x, y = (int(value) for value in random.integers(radius + 1, SIZE - radius - 1, 2))
    box = (x - radius, y - radius, x + radius, y + radius)
    fill = COLOURS[colour]
    if shape == "square":
        draw.rectangle(box, fill)
    elif shape == "circle":
        draw.ellipse(box, fill)
    elif shape == "triangle":
        draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill)
    else:
        draw.rectangle((x - 2, box[1], x + 2, box[3]), fill)
        draw.rectangle((box[0], y - 2, box[2], y + 2), fill)
    return "png", _image_bytes([image], "PNG")


def _draw_video(
    colour: str, direction: str, copy: int, random: np.random.Generator
) -> tuple[str, bytes]:
    """An animated GIF of a square that crosses the picture in four frames."""
    background = _background(random)
    side = int(random.integers(8, 12))
    across = int(random.integers(1, SIZE - side - 1))
    step_x, step_y = DIRECTIONS[direction]
    frames = []
    for frame in range(FRAMES):
        along = 1 + (SIZE - side - 2) * frame // (FRAMES - 1)
        if step_x + step_y < 0:
            along = SIZE - side - along
        x, y = (along, across) if step_x else (across, along)
        image = background.copy()
        ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), COLOURS[colour])
        frames.append(image)
    return "gif", _image_bytes(frames, "GIF")


def _background(random: np.random.Generator) -> Image.Image:
    grey = int(random.integers(10, 60))
    return Image.new("RGB", (SIZE, SIZE), (grey, grey, grey))


def _image_bytes(frames: list[Image.Image], kind: str) -> bytes:
    buffer = io.BytesIO()
    if len(frames) == 1:
        frames[0].save(buffer, kind)
    else:
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=125, loop=0)
    return buffer.getvalue()


def _draw_audio(
    pitch: str, waveform: str, copy: int, random: np.random.Generator
) -> tuple[str, bytes]:
    """A tone: 16 kHz WAV, or 22.05 kHz FLAC for every second copy."""
    extension, rate = (("wav", 16000), ("flac", 22050))[copy % 2]
    frequency = MIDDLE_C * 2 ** (SEMITONES[PITCHES.index(pitch)] / 12)
    time = np.arange(int(SECONDS * rate)) / rate
    phase = frequency * time + random.uniform()
    turn = phase % 1
    wave = {
        "sine": np.sin(2 * np.pi * phase),
        "square": np.where(turn < 0.5, 1.0, -1.0),
        "sawtooth": 2 * turn - 1,
        "triangle": 4 * np.abs(turn - 0.5) - 1,
    }[waveform]
    fade = np.clip(np.minimum(time, time[::-1]) / 0.01, 0, 1)
    buffer = io.BytesIO()
    volume = random.uniform(0.3, 0.8)
    soundfile.write(buffer, volume * fade * wave, rate, format=extension, subtype="PCM_16")
    return extension, buffer.getvalue()


def _draw_pointcloud(
    solid: str, stretch: str, copy: int, random: np.random.Generator
) -> tuple[str, bytes]:
    """128 points (x, y, z) on the surface of a solid, turned about the vertical axis."""
    points = _SOLIDS[solid](random) * STRETCHES[stretch]
    angle = random.uniform(0, np.pi / 6)
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    buffer = io.BytesIO()
    np.save(buffer, (points @ turn.T).astype(np.float32), allow_pickle=False)
    return "npy", buffer.getvalue()


def _ball(random: np.random.Generator) -> Floats:
    points = random.normal(size=(POINTS, 3))
    length: Floats = np.linalg.norm(points, axis=1, keepdims=True)
    return points / length


def _cube(random: np.random.Generator) -> Floats:
    points = random.uniform(-0.8, 0.8, (POINTS, 3))
    face = random.integers(0, 3, POINTS)
    points[np.arange(POINTS), face] = np.where(random.uniform(size=POINTS) < 0.5, -0.8, 0.8)
    return points


def _round_body(radius_at: Callable[[Floats], Floats], random: np.random.Generator) -> Floats:
    """Points on a surface of revolution with the given radius at each height in -1 .. 1."""
    height = random.uniform(-1, 1, POINTS)
    angle = random.uniform(0, 2 * np.pi, POINTS)
    radius = radius_at(height)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)


def _cylinder(random: np.random.Generator) -> Floats:
    return _round_body(lambda height: np.full_like(height, 0.7), random)


def _cone(random: np.random.Generator) -> Floats:
    return _round_body(lambda height: (1 - height) / 2, random)


def _hourglass(random: np.random.Generator) -> Floats:
    return _round_body(np.abs, random)


def _pyramid(random: np.random.Generator) -> Floats:
    height = random.uniform(-1, 1, POINTS)
    half = (1 - height) / 2
    side = random.integers(0, 4, POINTS)
    along = random.uniform(-1, 1, POINTS) * half
    x = np.select([side == 0, side == 1], [half, -half], along)
    y = np.select([side == 2, side == 3], [half, -half], along)
    return np.stack([x, y, height], axis=1)


def _ring(random: np.random.Generator) -> Floats:
    around, inside = random.uniform(0, 2 * np.pi, (2, POINTS))
    radius = 0.75 + 0.25 * np.cos(inside)
    ring = [radius * np.cos(around), radius * np.sin(around), 0.25 * np.sin(inside)]
    return np.stack(ring, axis=1)


def _cross(random: np.random.Generator) -> Floats:
    points = random.uniform(-0.15, 0.15, (POINTS, 3))
    points[np.arange(POINTS), random.integers(0, 3, POINTS)] = random.uniform(-1, 1, POINTS)
    return points


_SOLIDS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "ball": _ball,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "hourglass": _hourglass,
    "pyramid": _pyramid,
    "ring": _ring,
    "cross": _cross,
}

TOPICS = (
    _Topic(
        modality="image",
        first=tuple(COLOURS),
        second=("square", "circle", "triangle", "cross"),
        caption="a {first} {second}",
        question="What colour is it?",
        asked=0,
        draw=_draw_image,
    ),
    _Topic(
        modality="video",
        first=tuple(COLOURS),
        second=tuple(DIRECTIONS),
        caption="a {first} square moving {second}",
        question="Which way does it move?",
        asked=1,
        draw=_draw_video,
    ),
    _Topic(
        modality="audio",
        first=PITCHES,
        second=("sine", "square", "sawtooth", "triangle"),
        caption="a {second} tone on {first}",
        question="Which waveform is it?",
        asked=1,
        draw=_draw_audio,
    ),
    _Topic(
        modality="pointcloud",
        first=tuple(_SOLIDS),
        second=tuple(STRETCHES),
        caption="a {second} {first}",
        question="Which solid is it?",
        asked=0,
        draw=_draw_pointcloud,
    ),
)
