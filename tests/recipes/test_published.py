"""The eight published datasets from small sources in their official layouts: counts, ids, texts."""

import re
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mera_ds.errors import DataError, InputError
from mera_ds.media import decode
from mera_ds.shards.format import read_index
from mera_ds.shards.lint import lint, lint_pair
from mera_ds.shards.reader import ShardReader

from .conftest import Built, make
from .sources import CLIPS, UIDS, WRITERS, cloud, coco_name, dump, write_karpathy

Get = Callable[[str], Built]

COUNTS = {
    "coco": ((6, 6, 0), (3, 15, 0)),
    "okvqa": ((2, 0, 6), (2, 0, 3)),
    "msvd": ((3, 5, 0), (2, 4, 0)),
    "msvdqa": ((3, 0, 4), (2, 0, 3)),
    "audiocaps": ((5, 5, 0), (3, 15, 0)),
    "clothoaqa": ((2, 0, 10), (1, 0, 5)),
    "cap3d": ((6, 6, 0), (3, 3, 0)),
    "cap3dqa": ((5, 0, 5), (3, 0, 3)),
}
"""Media, captions and questions of train and test."""


def texts(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Return key -> texts, each as (id, question, answers…)."""
    with ShardReader(folder) as reader:
        return {
            sample.key: [(t.id, t.question, *t.answers) for t in reader.read_texts(position)]
            for position, sample in enumerate(reader.samples)
        }


def media(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Return key -> extension and content."""
    with ShardReader(folder) as reader:
        return {
            sample.key: (sample.extension, reader.read_media(position))
            for position, sample in enumerate(reader.samples)
        }


@pytest.mark.parametrize("name", WRITERS)
def test_counts_and_soundness(name: str, built: Get) -> None:
    dataset = built(name)
    for folder, (samples, captions, questions) in zip(
        (dataset.train, dataset.test), COUNTS[name], strict=True
    ):
        index = read_index(folder)
        assert index.counts == {
            "samples": samples,
            "texts": captions + questions,
            "caption": captions,
            "qa": questions,
        }
        assert index.recipe["name"] == name
        assert index.recipe["annotations"]
        assert index.licence
        assert lint(folder, partial(decode, index.modality)) == []
        listed = (folder / "ids.txt").read_text().splitlines()
        assert listed == [f"{key}#{t[0]}" for key, each in texts(folder).items() for t in each]
    assert lint_pair(dataset.train, dataset.test) == []
    assert {path.name for path in (dataset.out / name).iterdir()} == {"train", "test"}


def test_coco_takes_the_caption_with_the_lowest_id(built: Get) -> None:
    dataset = built("coco")
    found = texts(dataset.train)
    assert list(found) == [f"{number:012d}" for number in range(1, 7)]
    assert found["000000000003"] == [("c301", "", "image 3 text 1")]
    for key, captions in texts(dataset.test).items():
        number = int(key)
        assert captions == [
            (f"c{10 * number + n}", "", f"Image {number}, nr {n}.") for n in range(5)
        ]
    for key, (extension, content) in media(dataset.train).items():
        file = dataset.source / "train2014" / coco_name("train2014", int(key))
        assert (extension, content) == ("jpg", file.read_bytes()), "a JPEG stays as it is"


def test_coco_with_karpathys_file(tmp_path: Path) -> None:
    dataset = make("coco", tmp_path)
    write_karpathy(dataset.source)
    dataset.build()
    assert list(texts(dataset.test)) == ["000000000102", "000000000104"]
    dataset.build("holdout=val2014", "train_captions=all")
    assert len(texts(dataset.test)) == 5
    assert len(texts(dataset.train)["000000000003"]) == 2
    assert list(read_index(dataset.test).recipe["annotations"]) == [
        "captions_train2014.json",
        "captions_val2014.json",
        "dataset_coco.json",
    ]


def test_coco_with_lavis_file(tmp_path: Path) -> None:
    dataset = make("coco", tmp_path)
    entry = {"image": f"val2014/{coco_name('val2014', 103)}", "caption": ["one", "two ", "three"]}
    dump(dataset.source / "coco_karpathy_test.json", [entry])
    dataset.build("holdout=karpathy")
    assert texts(dataset.test) == {
        "000000000103": [("c0", "", "one"), ("c1", "", "two"), ("c2", "", "three")]
    }


@pytest.mark.parametrize(
    ("name", "caption", "complaint"),
    [
        ("val2014/103.jpeg.jpg", "one", "is no name of a COCO image"),
        (coco_name("val2014", 103), None, "has the caption None"),
    ],
)
def test_lavis_file_with_something_else(
    name: str, caption: str | None, complaint: str, tmp_path: Path
) -> None:
    dataset = make("coco", tmp_path)
    entry = {"image": name, "caption": ["one", caption]}
    dump(dataset.source / "coco_karpathy_test.json", [entry])
    with pytest.raises(DataError, match=rf"coco_karpathy_test\.json: .*{complaint}"):
        dataset.build()
    assert not dataset.out.exists()


def test_okvqa_has_a_sample_for_each_distinct_answer(built: Get) -> None:
    train = texts(built("okvqa").train)
    assert train["000000000001"] == [
        ("q10-0", "What is 10?", "braid"),
        ("q10-1", "What is 10?", "pony tail"),
        ("q10-2", "What is 10?", "ponytail"),
        ("q11-0", "What is 11?", "dog"),
    ]
    assert texts(built("okvqa").test)["000000000101"] == [
        ("q1010", "What is 1010?", "race", "motocross", "ride"),
        ("q1011", "What is 1011?", "two", "2", "three"),
    ]


def test_okvqa_options(tmp_path: Path) -> None:
    dataset = make("okvqa", tmp_path)
    dataset.build("train_answers=most-frequent", "answers=raw_answer", "test_size=1")
    assert texts(dataset.train)["000000000002"] == [("q20-0", "What is 20?", "the a")]
    assert read_index(dataset.test).counts["qa"] == 1


def test_msvd_names_and_splits(built: Get) -> None:
    dataset = built("msvd")
    train = texts(dataset.train)
    assert list(train) == ["vid1", "vid2", "vid1200"]
    assert [text[2] for text in train["vid1"]] == [
        "a squirrel is eating a peanut in it's shell",
        "eats",
        "eats",
    ]
    assert list(texts(dataset.test)) == ["vid1301", "vid1970"]
    assert texts(dataset.test)["vid1970"][2] == ("c2", "", "une souris énorme")
    with ShardReader(dataset.train) as reader:
        assert reader.read_record(0)["source"] == CLIPS[1]
    assert read_index(dataset.train).recipe["dropped"] == {
        "clip unknown": 1,
        "empty text": 1,
        "validation split": 1,
    }


def test_msvd_clips_become_four_frames(built: Get, tmp_path: Path) -> None:
    dataset = built("msvd")
    for shade, (extension, content) in zip(
        (10, 22, 34), media(dataset.train).values(), strict=True
    ):
        assert extension == "webp"
        frames = decode("video", extension, content, "clip")
        assert frames.shape == (4, 32, 32, 3)
        expected = shade + 8 * np.array([0, 3, 7, 11])
        assert np.abs(frames.mean((1, 2, 3)) - expected).max() < 4
    extension, content = media(dataset.test)["vid1301"]
    assert decode("video", extension, content, "one frame").shape == (1, 32, 32, 3)
    dataset.build("frames=0", out=tmp_path)
    kept = media(tmp_path / "msvd" / "train")
    assert {key: extension for key, (extension, _) in kept.items()} == {
        "vid1": "avi",
        "vid2": "mp4",
        "vid1200": "avi",
    }
    assert kept["vid1"][1] == (dataset.source / "YouTubeClips" / f"{CLIPS[1]}.avi").read_bytes()


def test_msvd_lines_end_at_line_feeds_and_names_at_white_space(tmp_path: Path) -> None:
    dataset = make("msvd", tmp_path)
    lines = [f"{CLIPS[1]}\ta man\u0085 waits", f"{CLIPS[1970]}  a\u2028cat"]
    (dataset.source / "AllVideoDescriptions.txt").write_bytes("\r\n".join(lines).encode())
    dataset.build()
    assert texts(dataset.train) == {"vid1": [("c0", "", "a man waits")]}
    assert texts(dataset.test) == {"vid1970": [("c0", "", "a cat")]}


def test_msvd_from_the_tar_as_downloaded(built: Get, tmp_path: Path) -> None:
    dataset = make("msvd", tmp_path)
    with tarfile.open(dataset.source / "YouTubeClips.tar", "w") as archive:
        archive.add(dataset.source / "YouTubeClips", "YouTubeClips")
    shutil.rmtree(dataset.source / "YouTubeClips")
    dataset.build()
    for split in ("train", "test"):
        tars = [place / "msvd" / split / "00000.tar" for place in (dataset.out, built("msvd").out)]
        assert tars[0].read_bytes() == tars[1].read_bytes()


def test_msvd_from_the_corpus_file(tmp_path: Path) -> None:
    dataset = make("msvd", tmp_path)
    (dataset.source / "AllVideoDescriptions.txt").unlink()
    (dataset.source / "video_corpus.csv").write_bytes(
        b"VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\r\n"
        b"-4wsuPCjDBc,5,15,1,clean,9,English,A squirrel.\r\n"
        b"-4wsuPCjDBc,5,15,1,clean,9,German,Ein H\xf6rnchen.\r\n"
        b'zzit5b_-ukg,5,20,1,unverified,9,English,"A cat, eating."\r\n'
    )
    dataset.build()
    assert texts(dataset.train) == {"vid1": [("c0", "", "A squirrel.")]}
    assert texts(dataset.test) == {"vid1970": [("c0", "", "A cat, eating.")]}


def test_msvdqa_questions_are_on_the_clips_of_their_numbers(built: Get) -> None:
    dataset = built("msvdqa")
    assert texts(dataset.train)["vid1"] == [
        ("q0", "who eats?", "squirrel"),
        ("q1", "what is eaten?", "peanut"),
    ]
    assert list(texts(dataset.test)) == ["vid1301", "vid1970"]


def test_audiocaps_names_and_missing_clips(built: Get) -> None:
    dataset = built("audiocaps")
    stored = media(dataset.train)
    assert {key: extension for key, (extension, _) in stored.items()} == {
        "Y-clip_000000_0": "wav",
        "Y-clip_000001_30": "flac",
        "Y-clip_000002_60": "wav",
        "Y-clip_000003_90": "wav",
        "Y-clip_000004_120": "flac",
    }
    assert stored["Y-clip_000002_60"][1] == (dataset.source / "audio" / "92.wav").read_bytes()
    assert texts(dataset.train)["Y-clip_000002_60"] == [("c92", "", 'A "woman" talks 2, then')]
    left_out = (dataset.train / "left_out.txt").read_text().splitlines()
    assert [line.partition("\t")[0] for line in left_out] == [
        "-clip_000005_150",
        "-clip_000006_180",
    ]
    assert "no samples" in left_out[0]
    assert "no file -clip_000006_180.wav or" in left_out[1]
    assert any("2 media left out (-clip_000005_150" in line for line in dataset.log)
    assert list(texts(dataset.test)) == [f"Ytest-{clip}_10" for clip in range(3)]
    assert read_index(dataset.test).recipe["dropped"] == {
        "known bad clip": 1,
        "test clip with too few captions": 4,
    }
    waves = {key: decode("audio", *each, key) for key, each in stored.items()}
    assert {(w.rate, len(w.waveform)) for w in waves.values()} == {
        (8000, 1),
        (16000, 2),
        (44100, 1),
        (8000, 2),
        (16000, 1),
    }


def test_audiocaps_rows(tmp_path: Path) -> None:
    dataset = make("audiocaps", tmp_path)
    dataset.build("tolerance=0.3", "test_unit=rows", "test_size=7")
    assert read_index(dataset.test).counts["caption"] == 7


def test_clothoaqa_keeps_rows_of_sure_annotators(built: Get) -> None:
    dataset = built("clothoaqa")
    found = texts(dataset.train)
    assert [key.rpartition("-")[0] for key in found] == ["Bike-wheel", "Caf-Z-rich-2"]
    assert list(found.values())[1] == [
        ("q6", "Is it naïve?", "yes"),
        ("q7", "Is it naïve?", "yes"),
        ("q8", "Is it naïve?", "no"),
        ("q9", "How many, exactly?", "yes"),
        ("q10", "How many, exactly?", "yes"),
    ]
    with ShardReader(dataset.train) as reader:
        assert reader.read_record(1)["source"] == "Café (Zürich) #2.wav"
    assert read_index(dataset.train).recipe["dropped"] == {"confidence not yes": 3}


def test_cap3d_captions_and_filters(built: Get) -> None:
    dataset = built("cap3d")
    train, test = texts(dataset.train), texts(dataset.test)
    found = {key: each[0][2] for key, each in (train | test).items()}
    assert not train.keys() & test.keys()
    expected = {uid: f"a red chair number {n}" for n, uid in enumerate(UIDS)}
    expected[UIDS[1]] = 'a table, with "legs".'
    expected[UIDS[2]] = "a stray quote at the front"
    expected[UIDS[3]] = "a stray quote at the end"
    expected[UIDS[4]] = "two lines"
    expected[UIDS[6]] = "y" * 100
    assert found.items() <= expected.items()
    assert UIDS[5] not in found
    dropped = read_index(dataset.train).recipe["dropped"]
    assert dropped["caption longer than 100 characters"] == 1
    assert dropped["damaged object"] == 1


def test_cap3d_points_of_all_three_forms(built: Get) -> None:
    dataset = built("cap3d")
    stored = media(dataset.train) | media(dataset.test)
    assert len({UIDS.index(key) // 5 for key in stored}) == 3
    for key, (extension, content) in stored.items():
        points = decode("pointcloud", extension, content, key)
        assert points.shape == (32, 6)
        assert np.abs(np.linalg.norm(points[:, :3], axis=1).max() - 1) < 1e-5
        assert np.abs(points[:, :3].mean(0)).max() < 1e-5
        colours = {tuple(colour) for colour in np.rint(points[:, 3:] * 255).astype(int)}
        assert colours <= {tuple(p[3:].astype(int)) for p in cloud(UIDS.index(key))}


def test_cap3d_holdout_and_exclusion(tmp_path: Path) -> None:
    dataset = make("cap3d", tmp_path)
    (dataset.source / "val_object_ids_3000.txt").write_text("\n".join(UIDS[:4]))
    (tmp_path / "ids.txt").write_text(f"{UIDS[11]}#q0\n")
    dataset.build("points=32", "test_size=2", f"exclude={tmp_path / 'ids.txt'}")
    train, test = texts(dataset.train), texts(dataset.test)
    assert len(test) == 2
    assert set(test) <= set(UIDS[:4])
    assert set(train) == {UIDS[4], *UIDS[6:11]}
    with pytest.raises(InputError, match="there is no such file"):
        dataset.build("exclude=nowhere.txt")


def test_cap3dqa_has_no_test_object_in_training(built: Get) -> None:
    dataset = built("cap3dqa")
    train, test = texts(dataset.train), texts(dataset.test)
    assert not train.keys() & test.keys()
    assert read_index(dataset.train).recipe["dropped"]["row without an object's id"] == 1


def test_cap3dqa_options(tmp_path: Path) -> None:
    dataset = make("cap3dqa", tmp_path)
    dataset.build("points=32", "drop_model=true", "synthetic=true", "test_size=1", "seed=3")
    asked = [text for each in texts(dataset.train).values() for text in each]
    assert not any("model" in text[2] for text in asked)
    made = [text for text in asked if text[1].startswith("Is this a thing")]
    assert 0 < len(made) < len(asked)
    assert {text[2] for text in made} <= {"yes", "no"}


def test_options_are_strict(tmp_path: Path) -> None:
    dataset = make("msvdqa", tmp_path)
    with pytest.raises(InputError, match="'frame' is unknown; did you mean 'frames'"):
        dataset.build("frame=4")
    with pytest.raises(InputError, match="frames is 'four'; expected int"):
        dataset.build("frames=four")
    with pytest.raises(InputError, match="test_size is 0; it must be at least 1"):
        dataset.build("test_size=0")
    with pytest.raises(InputError, match=r"tolerance is 2\.0; it must be in \[0, 1\]"):
        dataset.build("tolerance=2")


@pytest.mark.parametrize("name", WRITERS)
def test_all_missing_files_are_named(name: str, tmp_path: Path) -> None:
    dataset = Built(name, tmp_path, [])
    dataset.source.mkdir()
    with pytest.raises(InputError) as caught:
        dataset.build()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"--source {dataset.source} lacks files of {name}")
    assert len(lines) >= 3
    assert all("(" in line for line in lines[1:])
    assert re.search(r"/ or .*(\.zip|\.tar)", lines[-1]), "the media, too"
    assert not dataset.out.exists()


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    dataset = make("coco", tmp_path)
    annotations = dataset.source / "annotations" / "captions_train2014.json"
    for content, complaint in (
        (b"{", "is not valid JSON"),
        (b"{}", "annotations: expected a list"),
        (b'{"annotations": [{"image_id": "1"}]}', r"annotations\[0\]: 'image_id' is '1'"),
    ):
        annotations.write_bytes(content)
        with pytest.raises(DataError, match=complaint):
            dataset.build()
    assert not dataset.out.exists()
