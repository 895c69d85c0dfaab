"""The checked-in pocket set, and the recipe that made it."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mera_ds.errors import InputError
from mera_ds.files import sha256_file
from mera_ds.media import decode
from mera_ds.recipes import build
from mera_ds.recipes.pocket import ogg, sources
from mera_ds.recipes.pocket.audio import cc0_files
from mera_ds.recipes.pocket.items import head_word, split_by_concept
from mera_ds.recipes.pocket.mesh import normalise, parse_obj, sample_surface
from mera_ds.shards.format import Text, read_index
from mera_ds.shards.lint import lint, lint_pair
from mera_ds.shards.reader import ShardReader

POCKET = Path(__file__).parents[2] / "shards" / "pocket"
MODALITIES = ("image", "video", "audio", "pointcloud")
SPLITS = ("train", "test")
MAX_BYTES = 24_000_000
MAX_MAJORITY = 0.40
SMALLEST = {"train": 440, "test": 90}
PACKAGES_VARIABLE = "MERA_POCKET_SOURCES"


def texts_of(modality: str, split: str) -> list[tuple[Text, ...]]:
    with ShardReader(POCKET / modality / split) as reader:
        return [reader.read_texts(position) for position in range(len(reader))]


def files_below(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("modality", MODALITIES)
def test_set_is_sound_and_its_splits_are_disjoint(modality: str) -> None:
    train, test = (POCKET / modality / split for split in SPLITS)

    def decodes(extension: str, content: bytes, name: str) -> object:
        return decode(modality, extension, content, name)

    assert lint(train, decodes) == []
    assert lint(test, decodes) == []
    assert lint_pair(train, test) == []
    assert {sample.concept for sample in read_index(train).samples}.isdisjoint(
        sample.concept for sample in read_index(test).samples
    )


def test_set_is_small() -> None:
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("modality", MODALITIES)
def test_every_medium_has_a_caption_and_a_closed_question(modality: str, split: str) -> None:
    choices = read_index(POCKET / modality / split).choices["qa"]
    assert choices is not None
    assert 3 <= len(choices) <= 6
    samples = texts_of(modality, split)
    assert len(samples) >= SMALLEST[split]
    answers: Counter[str] = Counter()
    for texts in samples:
        captions = [text.answers[0] for text in texts if text.task == "caption"]
        (question,) = (text for text in texts if text.task == "qa")
        assert 1 <= len(captions) <= 3
        for caption in captions:
            assert caption == caption.lower()
            assert 1 <= len(caption.split()) <= 6
        assert 2 <= len(question.question.split()) <= 5
        assert question.answers[0] in choices
        answers[question.answers[0]] += 1
    assert set(answers) == set(choices)
    assert max(answers.values()) / len(samples) <= MAX_MAJORITY


def test_questions_and_answers_tell_the_modalities_apart() -> None:
    questions = {texts[-1].question for m in MODALITIES for texts in texts_of(m, "test")[:1]}
    answers = [word for m in MODALITIES for word in read_index(POCKET / m / "test").choices["qa"]]
    assert len(questions) == len(MODALITIES)
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("modality", MODALITIES)
def test_test_captions_share_words_with_training(modality: str) -> None:
    known = {w for texts in texts_of(modality, "train") for w in texts[0].answers[0].split()}
    unknown = [
        texts[0].answers[0]
        for texts in texts_of(modality, "test")
        if known.isdisjoint(texts[0].answers[0].split())
    ]
    assert len(unknown) <= 0.05 * len(texts_of(modality, "test")), unknown


def test_media_have_the_promised_form() -> None:
    shapes = {}
    for modality in MODALITIES:
        with ShardReader(POCKET / modality / "test") as reader:
            extension = reader.index.samples[0].extension
            shapes[modality] = decode(modality, extension, reader.read_media(0), modality)
    assert shapes["image"].size == (64, 64)
    assert shapes["video"].shape == (4, 96, 96, 3)
    assert shapes["audio"].rate == 22_050
    assert shapes["audio"].waveform.shape[0] == 1
    assert shapes["audio"].waveform.shape[1] <= 2.3 * 22_050
    points = shapes["pointcloud"]
    assert points.shape == (1024, 3)
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=2e-3)


def test_notice_names_every_licence_and_package() -> None:
    notice = (POCKET / "NOTICE").read_text(encoding="utf-8")
    recorded = json.loads((POCKET / "SOURCES.json").read_text(encoding="utf-8"))
    assert len(recorded["packages"]) == len(sources.PACKAGES)
    for package in recorded["packages"]:
        assert re.sub(r"-\d$", "", package["package"]) in notice
        for licence in ("Apache-2.0", "MIT", "CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-US"):
            assert licence in notice or licence not in package["licence"]
        assert len(package["sha256"]) == 64
    assert "GPL" not in json.dumps(recorded)


def test_missing_packages_are_named_with_the_commands(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        build("pocket", tmp_path, tmp_path / "out", lambda _: None)
    for command in (
        "npm pack emoji-datasource-google@16.0.0",
        "apt-get download sweethome3d-furniture=1.8-1",
    ):
        assert command in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_changed_package_is_refused(tmp_path: Path) -> None:
    for package in sources.PACKAGES:
        (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(InputError, match="SHA-256"):
        build("pocket", tmp_path, tmp_path / "out", lambda _: None)


def test_split_keeps_concepts_whole_and_classes_balanced() -> None:
    class Thing:
        def __init__(self, number: int) -> None:
            self.concept = f"concept {number // 2}"
            self.answer = "common" if number < 160 else "rare"

    things = [Thing(number) for number in range(200)]
    train, test = split_by_concept(things, 40, "seed")
    assert {thing.concept for thing in train}.isdisjoint(thing.concept for thing in test)
    counts = Counter(thing.answer for thing in test)
    assert 24 <= counts["common"] <= 27
    assert counts["rare"] == 12
    assert split_by_concept(things, 40, "seed") == (train, test)
    assert split_by_concept(things, 40, "another")[1] != test


def test_split_leaves_out_variants_of_test_concepts() -> None:
    class Thing:
        answer = "class"

        def __init__(self, number: int) -> None:
            self.concept = f"concept {number % 50}"
            self.variant = number >= 50

    things = [Thing(number) for number in range(100)]
    train, test = split_by_concept(things, 10, "seed", lambda thing: not thing.variant)
    assert len(test) == 10
    assert len(train) == 80
    assert not any(thing.variant for thing in test)


@pytest.mark.parametrize(
    ("label", "head"),
    [
        ("guide dog", "dog"),
        ("green book", "book"),
        ("books", "book"),
        ("closed mailbox with raised flag", "mailbox"),
        ("glass of milk", "glass"),
        ("statue of liberty", "statue"),
    ],
)
def test_head_word(label: str, head: str) -> None:
    assert head_word(label, frozenset(("green", "closed"))) == head


def test_ogg_bytes_are_the_same_every_time() -> None:
    waveform = np.sin(np.arange(8000) / 10).astype(np.float32)
    first, second = ogg.encode_ogg(waveform, 22_050), ogg.encode_ogg(waveform, 22_050)
    assert first == second
    sound = decode("audio", "ogg", first, "sine")
    assert np.corrcoef(sound.waveform[0, :8000], waveform)[0, 1] > 0.98


def test_only_files_listed_as_cc0_are_used() -> None:
    listed = (
        "Files: *\nCopyright: someone\nLicense: MIT\n\n"
        "Files: etc/samples/a.flac\n etc/samples/b.flac\nCopyright: x\nLicense: CC0\n\n"
        "Files: etc/samples/c.flac\nLicense: CC-BY-SA-4.0\n"
    )
    assert cc0_files(listed) == {"a.flac", "b.flac"}


def test_surface_is_sampled_by_area() -> None:
    square = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1/1 2/2 3/3 4/4\n"
    sliver = "v 5 0 0\nv 5.1 0 0\nv 5 0.1 0\nf -3 -2 -1\n"
    triangles = parse_obj(square + sliver)
    assert triangles.shape == (3, 3, 3)
    points = sample_surface(triangles, 4000, np.random.default_rng(0))
    on_square = points[points[:, 0] <= 1]
    assert len(on_square) / len(points) == pytest.approx(1 / 1.005, abs=0.01)
    assert on_square.mean(0) == pytest.approx([0.5, 0.5, 0], abs=0.03)
    assert np.linalg.norm(normalise(points), axis=1).max() == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.skipif(PACKAGES_VARIABLE not in os.environ, reason=f"{PACKAGES_VARIABLE} is not set")
def test_rebuild_is_the_same_to_the_byte(tmp_path: Path) -> None:
    build("pocket", Path(os.environ[PACKAGES_VARIABLE]), tmp_path / "pocket", lambda _: None)
    assert files_below(tmp_path / "pocket") == files_below(POCKET)
