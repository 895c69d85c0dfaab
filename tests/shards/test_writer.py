"""Shard folders are the same to the byte, are kept if they are right, and refuse bad samples."""

import dataclasses
import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mera_ds.errors import DataError, InputError, LockedError
from mera_ds.files import folder_lock
from mera_ds.shards.format import Text
from mera_ds.shards.reader import ShardReader
from mera_ds.shards.writer import BUILDING, RawSample

from .samples import SHARD_BYTES, contents, logged_samples, raw_sample, raw_samples, write

CAPTION = Text("c0", "caption", "", ("a thing",))


def test_index_holds_what_the_format_says(tmp_path: Path) -> None:
    write(tmp_path, raw_samples()[:1])
    tar = (tmp_path / "00000.tar").read_bytes()
    texts = raw_sample(0).texts
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "schema": 1,
        "dataset": "numbers",
        "split": "train",
        "modality": "image",
        "licence": "CC0-1.0",
        "recipe": {"name": "numbers", "version": 1},
        "counts": {"samples": 1, "texts": 2, "caption": 1, "qa": 1},
        "id_list_sha256": hashlib.sha256(b"n00").hexdigest(),
        "choices": {"qa": ["even", "odd"]},
        "shards": [
            {
                "name": "00000.tar",
                "bytes": len(tar),
                "sha256": hashlib.sha256(tar).hexdigest(),
                "samples": [
                    {
                        "key": "n00",
                        "concept": "number 0",
                        "media": ["bin", 512, 700],
                        "json": [512 + 1024 + 512, len(tar[2048:].split(b"\0")[0])],
                        "texts": [
                            ["caption", len(texts[0].answers[0])],
                            ["qa", len("even or odd?") + len("even")],
                        ],
                    }
                ],
            }
        ],
    }


def test_tar_is_ordinary_and_undated(folder: Path) -> None:
    with tarfile.open(folder / "00000.tar") as tar:
        members = tar.getmembers()
        record = json.load(tar.extractfile("n00.json"))  # type: ignore[arg-type]
    assert [member.name for member in members] == ["n00.bin", "n00.json", "n01.bin", "n01.json"]
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
    assert record == {
        "id": "n00",
        "concept": "number 0",
        "source": "numbers/0",
        "texts": [
            {"id": "c0", "task": "caption", "question": "", "answers": ["the number 0, naïve"]},
            {
                "id": "q0",
                "task": "qa",
                "question": "even or odd?",
                "answers": ["even", "who knows"],
            },
        ],
    }


@pytest.mark.parametrize("readers", [1, 5])
def test_same_bytes_however_the_samples_come(folder: Path, tmp_path: Path, readers: int) -> None:
    again = tmp_path / "again"
    write(again, logged_samples(tmp_path / "log"), readers=readers)
    assert contents(again) == contents(folder)


def test_tars_stay_below_the_limit(folder: Path) -> None:
    assert len(list(folder.glob("*.tar"))) == 6
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
            assert last.offset_data + last.size <= SHARD_BYTES


def test_a_sample_above_the_limit_gets_its_own_tar(tmp_path: Path) -> None:
    index = write(tmp_path, shard_bytes=1)
    assert [len(shard.samples) for shard in index.shards] == [1] * 12


def test_complete_folder_is_kept(folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    log = tmp_path / "log"
    write(folder)
    write(folder, logged_samples(log))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not log.exists(), "a complete folder needs no source"


@pytest.mark.parametrize(
    "changes",
    [
        {"shard_bytes": 9000},
        {"shard_bytes": 1},
        {"recipe": {"name": "numbers", "version": 2}},
        {"samples": raw_samples()[:-1]},
        {"samples": raw_samples()[::-1]},
        {"samples": [dataclasses.replace(s, media=b"z" * len(s.media)) for s in raw_samples()]},
        {"samples": [dataclasses.replace(s, source="elsewhere") for s in raw_samples()]},
    ],
)
def test_other_content_is_built_anew(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    write(folder, **changes)
    write(tmp_path / "fresh", **changes)
    assert contents(folder) == contents(tmp_path / "fresh")


def test_damaged_folder_is_repaired(folder: Path) -> None:
    good = contents(folder)
    tar = bytearray(good["00003.tar"])
    tar[600] ^= 1
    (folder / "00003.tar").write_bytes(tar)
    (folder / "00004.tar").unlink()
    write(folder)
    assert contents(folder) == good


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"key": "../x"}, r"\.\./x: the key must be"),
        ({"key": "/etc/passwd"}, "the key must be"),
        ({"key": "a.b"}, "the key must be"),
        ({"key": "-a"}, "the key must be"),
        ({"key": ""}, "the key must be"),
        ({"key": "a" * 81}, "the key must be"),
        ({"extension": "tar/x"}, "the extension"),
        ({"extension": "json"}, "the extension"),
        ({"media": b""}, "n03: the medium has 0 bytes"),
        ({"concept": " "}, "the concept is empty"),
        ({"texts": ()}, "it has no text"),
        ({"texts": (CAPTION, CAPTION)}, "same id"),
        ({"texts": (Text("c0", "caption", "", (" ",)),)}, "'c0': an answer is missing or empty"),
        ({"texts": (Text("c0", "caption", "", ()),)}, "'c0': an answer is missing or empty"),
        ({"texts": (Text("c0", "caption", "", ("a", "b")),)}, "exactly one answer"),
        ({"texts": (Text("q0", "qa", "", ("odd",)),)}, "the question is empty"),
        ({"texts": (Text("q0", "qa", "which?", ("both",)),)}, "'both' is not one of"),
        ({"texts": (Text("x0", "ocr", "", ("a",)),)}, "unknown task 'ocr'"),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_bad_sample_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], complaint: str, lazy: bool
) -> None:
    samples: list[Any] = raw_samples()
    samples[3] = dataclasses.replace(samples[3], **change)
    if lazy:
        samples = [lambda sample=sample: sample for sample in samples]
    with pytest.raises(DataError, match=complaint):
        write(tmp_path / "x", samples)
    assert not (tmp_path / "x" / "index.json").exists()


def test_all_bad_samples_are_named_before_anything_is_written(tmp_path: Path) -> None:
    samples = raw_samples()
    samples[2] = dataclasses.replace(samples[2], media=b"")
    samples[5] = dataclasses.replace(samples[5], key="a/b")
    samples[7] = dataclasses.replace(samples[7], key="n01")
    with pytest.raises(DataError) as caught:
        write(tmp_path / "x", samples)
    message = str(caught.value)
    assert "n02: the medium" in message
    assert "a/b: the key" in message
    assert "n01: the key of numbers/1 and of numbers/7" in message
    assert not (tmp_path / "x").exists()


def test_duplicate_key_across_tars_is_refused(tmp_path: Path) -> None:
    samples = [*logged_samples(tmp_path / "log"), lambda: raw_sample(1)]
    with pytest.raises(DataError, match=r"'n01' comes twice, first in 00000.tar"):
        write(tmp_path / "x", samples)


def test_a_failing_source_leaves_the_finished_tars_for_the_next_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    folder = tmp_path / "x"
    samples = logged_samples(log)
    with pytest.raises(DataError, match="numbers/6 is broken"):
        write(folder, [*samples[:6], _fail, *samples[7:]])
    assert sorted(path.name for path in folder.glob("*.tar*")) == ["00000.tar", "00001.tar"]
    log.unlink()
    write(folder, samples)
    assert log.read_text().split() == [f"n{number:02d}" for number in range(4, 12)]


def _fail() -> RawSample:
    raise DataError("numbers/6 is broken")


@pytest.mark.parametrize("changes", [{"recipe": {"version": 2}}, {"shard_bytes": 1}])
def test_tars_of_another_interrupted_build_are_not_used(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    log = tmp_path / "log"
    samples = logged_samples(log)
    with pytest.raises(DataError, match="numbers/6 is broken"):
        write(tmp_path / "x", [*samples[:6], _fail, *samples[7:]])
    log.unlink()
    write(tmp_path / "x", samples, **changes)
    assert len(log.read_text().split()) == 12
    write(tmp_path / "fresh", **changes)
    assert contents(tmp_path / "x") == contents(tmp_path / "fresh")


def test_a_failed_rebuild_leaves_no_index_beside_new_tars(folder: Path, tmp_path: Path) -> None:
    samples = logged_samples(tmp_path / "log")
    with pytest.raises(DataError, match="numbers/6 is broken"):
        write(folder, [*samples[:6], _fail, *samples[7:]], recipe={"version": 2})
    assert not (folder / "index.json").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        write(tmp_path, shard_bytes=0)
    with pytest.raises(InputError, match="for the task qa only"):
        write(tmp_path, choices={"caption": ("a",)})
    with pytest.raises(InputError, match="no sample"):
        write(tmp_path, [])


def test_two_builds_of_one_folder(tmp_path: Path) -> None:
    with folder_lock(tmp_path / BUILDING), pytest.raises(LockedError, match="in use"):
        write(tmp_path)


def test_answers_are_free_without_choices(tmp_path: Path) -> None:
    index = write(tmp_path, choices=None)
    assert index.choices == {"qa": None}
    assert len(ShardReader(tmp_path)) == 12


def test_files_beside_the_index(tmp_path: Path) -> None:
    files = {"ids.txt": "n00#c0\n", "left_out.txt": "x\tgone\n"}
    index = write(tmp_path, files=files)
    digest = hashlib.sha256(b"n00#c0\n").hexdigest()
    assert index.recipe["files"]["ids.txt"] == digest
    before = contents(tmp_path)
    assert before["left_out.txt"] == b"x\tgone\n"
    (tmp_path / "ids.txt").write_text("other")
    write(tmp_path, files=files)
    assert contents(tmp_path) == before
    write(tmp_path, files={"ids.txt": "n00#c0\n"})
    assert not (tmp_path / "left_out.txt").exists()
