"""The tiny recipe gives real media of four modalities, and recipes can be built by name."""

import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import mera_ds
from mera_ds import recipes
from mera_ds.errors import InputError
from mera_ds.media import decode
from mera_ds.recipes import tiny
from mera_ds.shards.lint import lint
from mera_ds.shards.reader import ShardReader

from .samples import contents

REPOSITORY = Path(mera_ds.__file__).parents[1]
MODALITIES = ("image", "video", "audio", "pointcloud")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the recipe once."""
    out = tmp_path_factory.mktemp("tiny")
    lines: list[str] = []
    folders = recipes.build("tiny", None, out, lines.append)
    assert folders == [out / m / split for m in MODALITIES for split in ("train", "test")]
    assert lines[0] == f"{out / 'image' / 'train'}: 48 media, 96 texts"
    return out


def _media(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    with ShardReader(folder) as reader:
        for position, sample in enumerate(reader.samples):
            yield sample.concept, sample.extension, reader.read_media(position)


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_medium_is_sound(built: Path, modality: str) -> None:
    for split, media in (("train", 48), ("test", 16)):
        folder = built / modality / split
        assert lint(folder, partial(decode, modality)) == []
        counts = {"samples": media, "texts": 2 * media, "caption": media, "qa": media}
        assert ShardReader(folder).index.counts == counts


@pytest.mark.parametrize("modality", MODALITIES)
def test_test_concepts_are_new_pairs_of_known_answers(built: Path, modality: str) -> None:
    readers = [ShardReader(built / modality / split) for split in ("train", "test")]
    train, test = ({sample.concept for sample in reader.samples} for reader in readers)
    assert not train & test
    asked = [
        Counter(reader.read_texts(position)[1].answers[0] for position in range(len(reader)))
        for reader in readers
    ]
    choices = readers[0].index.choices["qa"]
    assert choices is not None
    for answers in asked:
        assert set(answers) == set(choices)
        assert len(set(answers.values())) == 1, "no answer is more frequent than another"


def test_pictures_show_what_the_caption_says(built: Path) -> None:
    for concept, extension, media in _media(built / "image" / "train"):
        assert extension == "png"
        image = Image.open(io.BytesIO(media))
        assert image.size == (32, 32)
        colours = image.convert("RGB").getcolors()
        assert len(colours) == 2
        assert tiny.COLOURS[concept.split()[0]] in [colour for _, colour in colours]


def test_squares_move_the_way_the_caption_says(built: Path) -> None:
    for concept, _, media in _media(built / "video" / "train"):
        frames = decode("video", "gif", media, concept)
        assert frames.shape == (4, 32, 32, 3)
        colour, direction = concept.split()
        square = (frames == tiny.COLOURS[colour]).all(axis=-1)
        centres = np.array([np.argwhere(frame).mean(axis=0)[::-1] for frame in square])
        steps = np.sign(np.diff(centres, axis=0))
        assert (steps == tiny.DIRECTIONS[direction]).all()


def test_tones_have_their_pitch(built: Path) -> None:
    rates = Counter()
    for concept, extension, media in _media(built / "audio" / "train"):
        wave, rate = soundfile.read(io.BytesIO(media))
        rates[extension, rate] += 1
        assert len(wave) == int(0.25 * rate)
        pitch = concept.rsplit(" ", 1)[0]
        peak = np.abs(np.fft.rfft(wave)).argmax() * 4.0
        semitone = tiny.SEMITONES[tiny.PITCHES.index(pitch)]
        assert peak == pytest.approx(tiny.MIDDLE_C * 2 ** (semitone / 12), abs=4)
    assert rates == {("wav", 16000): 24, ("flac", 22050): 24}


def test_solids_have_their_stretch(built: Path) -> None:
    heights: dict[str, list[float]] = {}
    for concept, _, media in _media(built / "pointcloud" / "train"):
        points = np.load(io.BytesIO(media), allow_pickle=False)
        assert points.shape == (128, 3)
        assert points.dtype == np.float32
        solid, stretch = concept.split()
        if solid == "cube":
            heights.setdefault(stretch, []).append(float(np.ptp(points[:, 2])))
    assert max(heights["flat"]) < min(heights["plain"]) < min(heights["tall"])


def test_the_seed_decides_the_bytes(built: Path, tmp_path: Path) -> None:
    tiny.build(None, tmp_path / "same", lambda line: None)
    tiny.build(None, tmp_path / "other", lambda line: None, seed=1)
    assert contents(tmp_path / "same") == contents(built)
    assert contents(tmp_path / "other") != contents(built)


def test_unknown_recipe_and_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown recipe 'tinny'; did you mean 'tiny'\?"):
        recipes.build("tinny", None, tmp_path, lambda line: None)
    with pytest.raises(InputError, match="is not a folder"):
        recipes.build("tiny", tmp_path / "nothing", tmp_path, lambda line: None)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "shards" / "build.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


def test_build_script(built: Path, tmp_path: Path) -> None:
    done = _run("tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(built)
    refused = _run("tinny", "--out", str(tmp_path))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: unknown recipe 'tinny'")


def test_recipes_are_imported_when_used() -> None:
    code = "import sys, mera_ds.recipes; sys.exit('PIL' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )
